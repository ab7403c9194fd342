"""The cost model: what it counts in machine code, its arithmetic, and the predictions on file."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import predict
from benchmarks.harvest import cases
from benchmarks.harvest.__main__ import STAGES
from benchmarks.predict import calls, disassembly, kernels, model, stages, trace
from benchmarks.predict.launches import Launch
from benchmarks.predict.page import page

# Two loops: the outer 0x10-0x80 holds the inner 0x30-0x50 and a jump over 0x60; then the filling.
LISTING = """
\tFunction : made_up
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
                                                                     /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E R2, desc[UR4][R4.64] ;      /* 0x0 */
        /*0020*/              @!P1 BRA 0x70 ;                        /* 0x0 */
        /*0030*/                   FFMA R3, R2, R2, R3 ;             /* 0x0 */
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x0 */
        /*0050*/               @P0 BRA 0x30 ;                        /* 0x0 */
        /*0060*/                   MUFU.EX2 R3, R3 ;                 /* 0x0 */
        /*0070*/                   IADD3 R4, R4, 0x30, RZ ;          /* 0x0 */
        /*0080*/              @!P2 BRA 0x10 ;                        /* 0x0 */
        /*0090*/                   STG.E.128 desc[UR4][R4.64], R4 ;  /* 0x0 */
        /*00a0*/                   EXIT ;                            /* 0x0 */
        /*00b0*/                   BRA 0xb0;                         /* 0x0 */
        /*00c0*/                   NOP;                              /* 0x0 */
"""


def test_loops_of_a_listing() -> None:
    found, outside = disassembly.loops(disassembly.instructions(LISTING))
    assert [(loop.begin, loop.end, loop.depth) for loop in found] == [(0x10, 0x80, 0),
                                                                     (0x30, 0x50, 1)]  # fmt: skip
    outer, inner = found
    assert disassembly.counts(inner.own) == {"float": 1, "tensor": 1, "control": 1}
    assert disassembly.counts(outer.own) == {"global": 1, "mufu": 1, "integer": 1, "control": 2}
    assert [i.opcode for i in outside] == ["MOV", "STG.E.128", "EXIT"]


@pytest.mark.parametrize(
    "registers, shared, warps, blocks",
    [(106, 41_216, 8, 2), (240, 58_112, 4, 2), (32, 0, 4, 16), (32, 131_072, 4, 1)],
)
def test_blocks_that_an_sm_holds(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert disassembly.Code("made up", (), (), registers, 0, shared, warps).blocks == blocks


def made_up(loop: str, turns: int, warps: int, registers: int) -> tuple[disassembly.Code, Launch]:
    """A kernel named as one that has a rule, whose loop holds these opcodes."""
    own = tuple(disassembly.Instruction(16 * i, op, "") for i, op in enumerate(loop.split()))
    inner = disassembly.Loop(0, 16 * len(own), 0, own, own)
    outside = (disassembly.Instruction(0, "MOV", ""),) * 10
    code = disassembly.Code("forward_kernel", (inner,), outside, registers, 0, 0, warps)
    kernel = SimpleNamespace(__name__="forward_kernel")
    arguments = {"keys": 32 * turns, "BLOCK_N": 32}
    return code, Launch(kernel, 300, arguments, {})


CARD = predict.Card("made up", 100, 1e9, 2e12, 1e12, 1e15, 5e14, 5e13)


def test_a_kernel_takes_the_longest_of_its_limits() -> None:
    code, launch = made_up("FFMA IADD3 IADD3 MUFU.EX2 LDS.128", turns=100, warps=8, registers=64)
    cost = kernels.kernel_cost(launch, code, 1e6, CARD)
    constants = predict.MODEL
    # 3 of 300 programs on an SM, 2 warps of each on a scheduler
    issue = 3 * 2 * (10 + 100 * 5) / 1e9 / constants.issue
    integer = 3 * 2 * (10 * 2 + 100 * 4) / 1e9 / constants.pipe
    mufu = 3 * 2 * 100 * 8 / 1e9 / constants.pipe
    memory = 3 * 2 * 100 * 8 / 1e9 / constants.pipe
    assert 3 * 2 * constants.warp_issue > constants.issue  # warps enough
    assert cost.ms == pytest.approx(1e3 * max(issue, integer, mufu, memory))
    assert cost.bound in ("mufu", "memory")
    slow = kernels.kernel_cost(launch, code, 1e9, CARD)
    assert (slow.ms, slow.bound) == (pytest.approx(1.0), "bandwidth")
    short, launch = made_up("FFMA", turns=1, warps=4, registers=64)
    least = kernels.kernel_cost(launch, short, 0.0, CARD)
    assert (least.ms, least.bound) == (constants.kernel_us / 1e3, "launch")


def test_products_of_one_program_an_sm_overlap_with_nothing() -> None:
    loop = "HGMMA.64x64x16.F32.BF16 " + "FFMA " * 50
    constants = predict.MODEL
    tensor = 3 * 2 * 100 * 2 * 64 * 64 * 16 / 4 / model.TENSOR_CYCLE / 1e9 / constants.pipe
    for registers, alone in ((64, False), (255, True)):
        code, launch = made_up(loop, turns=100, warps=8, registers=registers)
        assert (code.blocks == 1) is alone
        share = min(constants.issue, constants.warp_issue * 2 * min(code.blocks, 3))
        issue = 3 * 2 * (10 + 100 * 51) / 1e9 / share
        cost = kernels.kernel_cost(launch, code, 0.0, CARD)
        expected = issue + tensor if alone else max(issue, tensor)
        assert cost.ms == pytest.approx(1e3 * expected)


@pytest.mark.parametrize("host, bound", [(0.5, "issue"), (9.0, "host")])
def test_a_call_takes_the_longer_of_kernels_and_cpu(host: float, bound: str) -> None:
    found = calls.total("case", "ours", 2.0, 101, host, "", "issue")
    gaps = (100 * predict.MODEL.gap_us + predict.MODEL.event_us) / 1e3
    assert found.ms == pytest.approx(max(2.0 + gaps, host))
    assert (found.bound, found.kernels_ms, found.launches) == (bound, 2.0, 101)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_every_case_is_predicted_or_has_a_reason(device: str) -> None:
    found = predict.load(device)
    wanted = {(c.name, who) for c in cases.all_cases() for who in c.contenders}
    assert set(found) == wanted
    for p in found.values():
        if p.ms is None:
            assert p.how.startswith("no prediction: ")
        else:
            assert p.kernels_ms
            assert p.launches
            assert p.ms >= p.kernels_ms > 0
            assert p.bound


def test_other_devices_have_no_prediction_and_loading_needs_no_triton() -> None:
    code = (
        "import sys; from benchmarks import predict; "
        "assert predict.load('NVIDIA H200, compute'); "
        "assert not predict.load('NVIDIA A100-SXM4-80GB'); "
        "assert not predict.load(''); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=predict.RESULTS.parents[1], check=True)


@pytest.mark.parametrize("card", predict.CARDS)
def test_the_page_is_that_of_the_file(card: str) -> None:
    path = predict.RESULTS / f"{card}-predicted.json"
    stored = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == page(stored)
    assert stored["card"] == vars(predict.CARDS[card])
    assert stored["model"] == vars(predict.MODEL)


@pytest.mark.parametrize("card", predict.CARDS)
def test_seconds_of_the_stages(card: str) -> None:
    stored = json.loads((predict.RESULTS / f"{card}-predicted.json").read_text())
    found = stages.by_stage(predict.read(stored))
    fresh = stages.stage_seconds(found, stored["specialisations"])
    assert {name: tuple(row) for name, row in stored["stages"].items()} == fresh
    assert sum(seconds for seconds, _ in fresh.values()) < 480
    assert list(fresh) == list(STAGES)


@pytest.mark.parametrize("who", [cases.SHARED, cases.QK_NORM])
@pytest.mark.parametrize("case", cases.attention(False)[:2], ids=lambda case: case.name)
def test_launches_on_file_are_those_of_the_code(
    case: cases.Case, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from benchmarks.predict import rules

    counted = made_up("FFMA", turns=1, warps=4, registers=64)[0]
    monkeypatch.setattr(kernels, "code_of", lambda launch: counted)
    monkeypatch.setattr(kernels, "turns", lambda launch, code: [])
    found = rules.of_attention(case, who, CARD)
    assert found.launches == predict.load("NVIDIA H100")[case.name, who].launches


def test_a_trace_counts_kernels_bytes_and_operations() -> None:
    def run() -> None:
        a, b = torch.empty(8, 16), torch.empty(16, 4)
        (a @ b).t().add(1.0).masked_fill(torch.empty(4, 8, dtype=torch.bool), 0.0)

    with trace.gpu():
        product, add, fill = trace.trace(run)
    assert (product.name, product.operations, product.precision) == ("mm", 1024.0, "float32")
    assert product.traffic == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert (add.name, add.launches, add.traffic) == ("add", 1, 2 * 4 * 32)
    assert (fill.name, fill.launches) == ("masked_fill", 2)
