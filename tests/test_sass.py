"""The counts in machine code: loops of made-up listings, the figures on file, and the kernels held
to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import predict, sass, tables
from benchmarks.predict import disassembly, launches
from tests.ops import triton_resources

CARD = predict.CARDS["h100"]


def listing(text: str) -> list[disassembly.Instruction]:
    """Instructions by lines of ``guard opcode operands``; a line's address is 16 x its number."""
    lines = [f"/*{16 * n:04x}*/  {line} ;" for n, line in enumerate(text.strip().splitlines())]
    return disassembly.instructions("\n".join(lines))


def test_a_slow_path_behind_the_end_belongs_to_its_loop() -> None:
    found = listing("""
        MOV R1, 0x3
        FADD R2, R2, R3
        @P0 BRA 0x70
        FMUL R2, R2, R3
        IADD3 R1, R1, 0x1, RZ
        @!P1 BRA 0x10
        EXIT
        MUFU.EX2 R2, R2
        MUFU.EX2 R2, R2
        BRA 0x40
    """)
    (loop,), outside = disassembly.loops(found)
    assert len(loop.own) == 8
    assert [i.opcode for i in loop.turn] == ["FADD", "BRA", "FMUL", "IADD3", "BRA"]
    assert [i.opcode for i in outside] == ["MOV", "EXIT"]
    assert [i.guard for i in loop.turn if i.guard] == ["@P0", "@!P1"]


def test_a_turn_passes_the_loops_inside_it() -> None:
    found = listing("""
        IADD3 R1, R1, 0x1, RZ
        @P0 BRA 0x50
        MOV R2, RZ
        FFMA R3, R2, R2, R3
        @P1 BRA 0x30
        @!P2 BRA 0x0
        EXIT
    """)
    (outer, inner), _ = disassembly.loops(found)
    assert [i.opcode for i in outer.turn] == ["IADD3", "BRA", "MOV", "BRA"]
    assert [i.opcode for i in inner.turn] == ["FFMA", "BRA"]
    assert (outer.depth, inner.depth) == (0, 1)


def test_waits_divergent_warps_and_subroutines_are_no_loops() -> None:
    found = listing("""
        BRA.DIV UR4, 0x80
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5
        @!P0 BRA 0x10
        CALL.REL.NOINC 0xb0
        FFMA R3, R2, R2, R3
        BRA.U UP0, 0x40
        STG.E R3, [R4]
        EXIT
        WARPSYNC.COLLECTIVE R4, 0x80
        SHFL.IDX R3, R3, R4, R5
        BRA 0x10
        MUFU.RCP R3, R3
        RET.REL.NODEC R4 0x0
        BRA 0xd0
    """)
    (loop,), outside = disassembly.loops(found)
    assert (loop.begin, loop.end) == (0x40, 0x50)
    assert [i.stem for i in outside] == ["BRA", "SYNCS", "BRA", "CALL", "STG", "EXIT"]


@pytest.mark.parametrize(
    "opcode, access",
    [
        ("LDG.E.128.CONSTANT", "LDG.128"), ("LDG.E.U16", "LDG.16"), ("LDS", "LDS.32"),
        ("LDSM.16.M88.4", "LDSM.128"), ("LDSM.16.MT88.2", "LDSM.64"), ("LDSM.16.M88", "LDSM.32"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS.128"), ("LD.E.64", "LD.64"), ("STL.S8", "STL.8"),
        ("UTMALDG.2D", "TMA"), ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "RED.32"),
        ("HGMMA.64x128x16.F32", ""), ("LDC.64", ""), ("FFMA", ""),
    ],
)  # fmt: skip
def test_accesses_by_kind_and_width(opcode: str, access: str) -> None:
    assert disassembly.Instruction(0, opcode, "").access == access


def kernel(**changes: object) -> sass.Kernel:
    """A kernel of one loop."""
    loop = sass.Part("", 0, 400, 400, 25.0, 0, {"float": 400}, {}, {"LDG.128": 2})
    outside = sass.Part("", 0, 50, 50, 0.0, 0, {"integer": 50}, {}, {})
    made = sass.Kernel(
        "attention", "a call", "Triton 0", "k", 1, 132, 8, 100, 0, 0, 2, [loop], outside,
        {"issue": 3.0, "bandwidth": 2.0},
    )  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({}, ""),
        ({"registers": 40, "blocks": 3}, ""),
        ({"loops": [replace(kernel().loops[0], element=27.4)]}, ""),
        ({"loops": [replace(kernel().loops[0], element=27.6)]}, "27.6 instructions an element"),
        ({"loops": [replace(kernel().loops[0], element=0.0, turn=20)]}, ""),
        ({"blocks": 1}, "1 blocks an SM"),
        ({"spilled": 8}, "8 B spilled"),
        ({"loops": []}, "0 loops, 1 on file"),
        ({"name": "new"}, "not on file"),
    ],
)
def test_what_is_worse(changes: dict[str, object], problem: str) -> None:
    found = sass.worse(kernel(**changes), [kernel()])
    assert [problem in line for line in found] == ([True] if problem else [])


def test_a_row_per_loop_and_columns_per_compiler() -> None:
    unlike = kernel(tool="Triton 1", loops=[], us={"bandwidth": 2.0}, unknown="no rule")
    table = sass.markdown("attention", [kernel(), unlike, kernel(op="other")]).splitlines()
    assert len(table) == 3
    row = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert row == ["k", "25.0 an element", "2 LDG.128", "100 / 2 / 0", "3 / - / 2",
                   "50, no loop", "", "100 / 2 / 0", "- / - / 2"]  # fmt: skip
    assert "no rule" in sass.text(unlike)
    assert "float 25.00" in sass.text(kernel())


def test_a_page_without_markers_is_named(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"a\n{sass.MARKER}old\n{tables.END}b\n<!-- c -->\nd\n{tables.END}e\n")
    tables.replace(page, sass.MARKER, "new")
    assert page.read_text() == f"a\n{sass.MARKER}new\n{tables.END}b\n<!-- c -->\nd\n{tables.END}e\n"
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match=r"README\.md: expected the lines"):
        tables.replace(page, sass.MARKER, "new")


@pytest.mark.parametrize("op", sass.ops())
def test_readme_has_the_figures_on_file(op: str) -> None:
    page = sass.readme(op)
    assert tables.between(page.read_text(), sass.MARKER, page) == (
        sass.markdown(op, sass.load()) + "\n"
    )


def test_every_op_is_on_file() -> None:
    assert {k.op for k in sass.load()} == set(sass.ops())


# compiled here

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for real")


@pytest.mark.aot
@compiles
@pytest.mark.parametrize("op", list(triton_resources.USUAL))
def test_no_kernel_is_worse_than_on_file(op: str) -> None:
    triton = pytest.importorskip("triton")
    on_file = [k for k in sass.load() if k.tool == f"Triton {triton.__version__}"]
    if not on_file:
        pytest.skip(f"no figures of Triton {triton.__version__} on file")
    found = list(sass.kernels_of(op, CARD))
    assert found
    assert not [problem for k in found for problem in sass.worse(k, on_file)]


@pytest.mark.aot
@compiles
def test_a_crowded_kernel_is_worse() -> None:
    """Two warps hold what four are meant to: 64 x 64 similarities and their gradients."""
    pytest.importorskip("triton")
    call = triton_resources.Attention()
    launch = next(
        launch
        for launch in triton_resources.launches(call, launches.TARGET)
        if launch.name == "backward_kv_kernel"
    )
    usual = sass.triton_kernel("attention", str(call), [launch], CARD)
    assert not sass.worse(usual, [usual])
    assert usual.us["tensor"] > 0
    half = launch.options["num_warps"] // 2
    crowded = replace(launch, options=launch.options | {"num_warps": half})
    problems = sass.worse(sass.triton_kernel("attention", str(call), [crowded], CARD), [usual])
    assert any("B spilled" in problem for problem in problems)


@pytest.mark.slow
@compiles
def test_no_cuda_kernel_is_worse_than_on_file() -> None:
    pytest.importorskip("triton", reason="its cuobjdump reads the object file")
    found = list(sass.kernels_of(sass.CUDA_OP, CARD))
    if not found:
        pytest.skip("no nvcc")
    on_file = sass.load()
    if found[0].tool not in {k.tool for k in on_file}:
        pytest.skip(f"no figures of {found[0].tool} on file")
    assert not [problem for k in found for problem in sass.worse(k, on_file)]


@pytest.mark.aot
@compiles
def test_command_line() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.sass", "--op", "contrastive"]
    command += ["--kernel", "loss"]
    run = dict(cwd=sass.ROOT, capture_output=True, text=True, check=True)
    lines = subprocess.run(command, **run).stdout
    assert "sigmoid_kernel+loss+gradient: " in lines
    assert "HGMMA" in lines
    rows = json.loads(subprocess.run([*command, "--json"], **run).stdout)
    assert [sass.kernel(row).name for row in rows] == [
        "sigmoid_kernel+loss+gradient", "sigmoid_kernel+loss"
    ]  # fmt: skip
