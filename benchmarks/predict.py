"""What the harvest will measure, predicted before any GPU has run it.

    PYTHONPATH=.venvs/triton-3.6.0 python -m benchmarks.predict              # h100 and h200
    PYTHONPATH=.venvs/triton-3.6.0 python -m benchmarks.predict --card h200  # one of them

writes ``results/<card>-predicted.json`` and the page ``.md`` made from it; :func:`load` reads them.

A kernel takes the longest of: its instructions through the schedulers and pipes of the busiest SM,
its products through the tensor cores, its bytes through the memory. Instructions are counted in the
machine code (:mod:`benchmarks.sass`), kernels and bytes by running each call on fake tensors
(:mod:`benchmarks.trace`). A call takes the longer of its kernels, with the gaps between them, and
the time that the CPU needs to launch them. Every number of the model stands in ``CARDS``, ``MODEL``,
``PIPES`` or ``PUBLISHED``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from benchmarks.harvest.cases import Case
    from benchmarks.sass import Code, Launch, Loop
    from benchmarks.trace import Kernel

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Card:
    """A GPU, nominal and as it is known to run.

    Args:
        sms, clock: multiprocessors; Hz that a long product sustains.
        nominal_bandwidth, bandwidth: bytes per second: the data sheet's, and a large copy's.
        nominal_tensor, tensor: bf16 operations per second: the data sheet's, and a large product's.
        float32: operations per second of a large float32 product, without TF32.
    """

    name: str
    sms: int
    clock: float
    nominal_bandwidth: float
    bandwidth: float
    nominal_tensor: float
    tensor: float
    float32: float


# Nominal: NVIDIA's data sheets of the SXM cards. Achieved: what copies and cuBLAS are commonly
# reported to reach; the harvest's first stage measures both.
CARDS = {
    "h100": Card("H100 SXM", 132, 1.7e9, 3.35e12, 3.0e12, 989e12, 700e12, 50e12),
    "h200": Card("H200", 132, 1.7e9, 4.8e12, 4.0e12, 989e12, 700e12, 50e12),
}


@dataclass(frozen=True)
class Model:
    """The constants that belong to no card; ``SOURCES`` says where each comes from."""

    schedulers: int = 4
    issue: float = 0.65
    pipe: float = 0.85
    warp_issue: float = 0.3
    kernel_us: float = 2.0
    gap_us: float = 1.0
    operator_us: float = 6.0
    launch_us: float = 10.0
    argument_us: float = 0.9
    call_us: float = 40.0
    event_us: float = 4.0


MODEL = Model()
SOURCES = {
    "schedulers": "schedulers of an SM, one instruction a cycle each (CUDA C++ Programming Guide)",
    "issue": "share of the cycles in which a scheduler with enough warps issues: assumed, what "
    "FlashAttention-2 reaches",
    "pipe": "share of a pipe's peak that is reached: assumed",
    "warp_issue": "instructions a cycle of one warp alone, which waits for its own results: assumed",
    "kernel_us": "least duration of a kernel, us: assumed, as profilers show empty ones",
    "gap_us": "from one queued kernel to the next, us: assumed",
    "operator_us": "CPU time of an eager torch operator, us: assumed",
    "launch_us": "CPU time of a Triton launch beside its arguments, us: assumed",
    "argument_us": "of each of its arguments, us: measured on an EPYC with Triton 3.6, 27 us to "
    "make 45 arguments and 36 us in the binder for 65",
    "call_us": "of a custom operator and its autograd, us: assumed",
    "event_us": "of a first kernel on an idle GPU, from the event before it, us: assumed",
}
# Cycles for which an instruction of a warp holds its scheduler's pipe: 32 threads over a quarter of
# the SM's lanes (CUDA C++ Programming Guide, arithmetic throughput, 9.0: 128 float32, 64 integer and
# conversion, 16 special functions, 32 memory). Memory instructions count once for each 4 bytes.
PIPES = {
    "float": ("float", 1), "imad": ("float", 2), "integer": ("integer", 2),
    "convert": ("integer", 2), "mufu": ("mufu", 8), "global": ("memory", 4),
    "shared": ("memory", 4), "generic": ("memory", 4), "local": ("memory", 4),
    "cp.async": ("memory", 4), "shuffle": ("memory", 4),
}  # fmt: skip
TENSOR_CYCLE = 1024  # bf16 operations a cycle of one scheduler's tensor core: 4,096 an SM
SKIPPED = ("table_edges_kernel", "logsumexp_kernel+positive")  # a branch passes most of a turn
# What others have measured, by name: TFLOP/s forward and backward at D = 64, by length.
PUBLISHED: dict[str, dict[int, tuple[float, float]]] = {
    # FlashAttention-3's paper, its curves of FlashAttention-2 on an H100; backward from the same.
    "flash": {512: (282, 230), 1024: (304, 260), 2048: (318, 285)},
    # The same paper's curves of FlashAttention-3, which cuDNN is close to.
    "cuDNN, no bias": {512: (333, 270), 1024: (392, 320), 2048: (460, 370)},
    # FlexAttention's authors: about nine tenths of FlashAttention-2 without a captured table; a
    # read of the table for each pair halves that here, as it does ours.
    "FlexAttention": {1024: (140, 0), 2048: (145, 0)},
    # CUTLASS' attention for sm_80 (torch's "efficient" one), which takes a bias: no curve for an
    # H100; from its A100 figures, scaled by the clock and the SMs.
    "SDPA + bias": {512: (110, 75), 1024: (120, 80), 2048: (125, 85)},
}
SIGLIP_768_MS = 46.9  # siglip-kernel's README: B = 65,536, d = 768, bfloat16, GH200
ATOMICS = 96 * 1.7e9  # additions a second to distinct words in the L2: one a slice and cycle
# The review of the CUDA spectrogram's code: its estimates, not counts. ms of values, 64 x 10 s.
SPECTROGRAM_MS = {128: 0.262, 512: 0.275}
PER_CALL_SETUP = 0.3  # s: inputs, a profiler's start and end, and its three calls


@dataclass(frozen=True)
class Prediction:
    """A figure of the harvest, or why there is none.

    Args:
        case, contender: of the harvest.
        ms: of one call between events; kernels_ms: of its kernels; launches: their number.
        bound: ``tensor``, ``issue``, ``integer``, ``float``, ``mufu``, ``memory`` (instructions),
            ``bandwidth``, ``launch`` (many short kernels) or ``host``.
        how: what it is made of; without a figure, the reason.
    """

    case: str
    contender: str
    ms: float | None
    kernels_ms: float | None
    launches: int | None
    bound: str
    how: str


def load(device: str) -> dict[tuple[str, str], Prediction]:
    """The predictions on file for a device by torch's name of it; none for other devices."""
    card = next((c for c in CARDS if c.upper() in device.upper().split()), None)
    if card is None:
        return {}
    found = json.loads((RESULTS / f"{card}-predicted.json").read_text())
    return {(p["case"], p["contender"]): Prediction(**p) for p in found["predictions"]}


# ---- one kernel


@dataclass(frozen=True)
class Cost:
    """What a launch needs on a card.

    Args:
        name: of the kernel; launches: how many like it.
        ms: of one; bound: by what.
        how: the product that makes it, for a reader to check.
    """

    name: str
    launches: int
    ms: float
    bound: str
    how: str = ""


def cycles(loop: Iterable[Any]) -> dict[str, float]:
    """Cycles for which one warp's instructions hold its scheduler's pipes."""
    found: dict[str, float] = {"issue": 0.0}
    for instruction in loop:
        found["issue"] += 1
        kind = instruction.kind
        if kind == "tensor":
            found["tensor"] = found.get("tensor", 0.0) + _tensor_operations(instruction) / 1024
        elif kind in PIPES:
            pipe, each = PIPES[kind]
            width = {".128": 4, ".64": 2, ".4": 4, ".2": 2}
            wide = 1
            if pipe == "memory" and kind != "shuffle":
                wide = next((n for s, n in width.items() if instruction.opcode.endswith(s)
                             or f"{s}." in instruction.opcode), 1)  # fmt: skip
            found[pipe] = found.get(pipe, 0.0) + each * wide
    return found


def _tensor_operations(instruction: Any) -> float:
    # of one warp: HGMMA.64x32x16 is four warps', HMMA.16816 one's
    shape = instruction.opcode.split(".")[1]
    if "x" in shape:
        m, n, k = (int(size) for size in shape.split("x"))
        return 2.0 * m * n * k / 4
    return 2.0 * int(shape[:2]) * int(shape[2:3]) * int(shape[3:])


def turns(launch: Launch, code: Code) -> list[tuple[Loop, float]]:
    """How often a program goes through each loop: a rule for each kernel."""
    a = launch.arguments
    outer = [loop for loop in code.loops if loop.depth == 0]
    name = launch.kernel.__name__
    if name == "forward_kernel":
        return [(outer[0], math.ceil(a["keys"] / a["BLOCK_N"]))]
    if name == "backward_kv_kernel":
        return [(outer[0], a["GROUP"] * math.ceil((a["row_end"] - a["row_begin"]) / a["BLOCK_M"]))]
    if name == "backward_q_kernel":
        whole = a["keys"] // a["BLOCK_N"]
        return [(outer[0], whole), (outer[-1], float(a["keys"] % a["BLOCK_N"] > 0))]
    if name == "index_kernel":  # a program goes through one of its two loops
        return [(outer[0], math.ceil(a["queries"] / a["BLOCK"]))]
    if name == "table_gradient_kernel":  # chains of one: the inner loop once in each turn
        return [(loop, math.ceil(a["pairs_per_part"] / a["BLOCK_J"])) for loop in code.loops]
    if name == "table_edges_kernel":
        return [(outer[0], math.ceil((a["row_end"] - a["row_begin"]) / a["BLOCK_M"]))]
    if name in ("logsumexp_kernel", "sigmoid_kernel", "gradient_kernel"):
        # gradient_kernel's first loop is that of bounded similarities, which the harvest's are
        return [(outer[0], math.ceil(math.ceil(a["columns"] / a["BLOCK_N"]) / a["SPLITS"]))]
    assert not outer, f"no rule for the loops of {name}"
    return []


def worked(name: str, loop: Loop) -> list[Any]:
    """Instructions of a turn: in ``SKIPPED`` kernels, without what the longest jump passes over."""
    if name not in SKIPPED:
        return list(loop.own)
    jumps = [
        (i.address, i.target) for i in loop.own
        if i.target is not None and i.address < i.target <= loop.end
    ]  # fmt: skip
    begin, end = max(jumps, key=lambda jump: jump[1] - jump[0])
    return [i for i in loop.own if not begin < i.address < end]


def kernel_cost(launch: Launch, code: Code, traffic: float, card: Card) -> Cost:
    """Time of one launch: of its busiest SM, or of its bytes."""
    total = cycles(code.outside)
    steps = []
    for loop, count in turns(launch, code):
        own = worked(launch.name, loop)
        for pipe, number in cycles(own).items():
            total[pipe] = total.get(pipe, 0.0) + count * number
        if count:
            steps.append(f"{count:,.0f} x {len(own)}")
    programs = math.ceil(launch.programs / card.sms)  # of the busiest SM
    warps = code.warps / MODEL.schedulers
    resident = warps * min(code.blocks, programs)
    seconds = {}
    for pipe, number in total.items():
        share = MODEL.pipe
        if pipe == "issue":
            share = min(MODEL.issue, MODEL.warp_issue * resident)
        seconds[pipe] = programs * warps * number / card.clock / share
    seconds["bandwidth"] = traffic / card.bandwidth
    seconds["launch"] = MODEL.kernel_us / 1e6
    bound = max(seconds, key=lambda pipe: seconds[pipe])
    how = (
        f"{launch.programs:,} programs of {code.warps} warps, {programs} on the busiest SM, "
        f"{code.blocks} at a time; a warp: {len(code.outside)}"
        + "".join(f" + {step}" for step in steps)
        + f" instructions; {traffic / 1e6:,.3g} MB; us: "
        + ", ".join(f"{pipe} {1e6 * s:.3g}" for pipe, s in seconds.items() if pipe != "launch")
    )
    return Cost(launch.name, 1, 1e3 * seconds[bound], bound, how)


_codes: dict[str, Code] = {}


def _code(launch: Launch) -> Code:
    from benchmarks import sass

    key = f"{launch.name} {sass.specialised(launch)} {launch.options}"
    if key not in _codes:
        _codes[key] = sass.code(launch)
    return _codes[key]


def moved(kernel: Kernel) -> float:
    """Bytes of a kernel: of its tensors each once. One that works on a band has the band's share of
    q, k, v and their gradients; table_edges_kernel passes over dS."""
    if kernel.launch is None or "ds" not in kernel.launch.arguments:
        return kernel.traffic
    a = kernel.launch.arguments
    band = a["ds"].numel() * a["ds"].element_size()
    others = kernel.traffic - band
    if kernel.name == "table_edges_kernel":
        return others
    like = a.get("raw_q", a.get("q"))
    share = 1.0
    if like is not None:
        share = a["ds"].shape[0] / (like.shape[0] * like.shape[1])
        share *= (a["row_end"] - a["row_begin"]) / a["queries"]
    return band + min(share, 1.0) * others


def costs(kernels: Sequence[Kernel], card: Card) -> list[Cost]:
    """Of each kernel of a call."""
    found = []
    for k in kernels:
        if k.launch is not None:
            found.append(kernel_cost(k.launch, _code(k.launch), moved(k), card))
            continue
        rate = card.tensor if k.precision == "bf16" else card.float32
        seconds = {
            "tensor" if k.precision == "bf16" else "float": k.operations / rate,
            "bandwidth": k.traffic / card.bandwidth,
            "launch": k.launches * MODEL.kernel_us / 1e6,
        }
        bound = max(seconds, key=lambda name: seconds[name])
        found.append(Cost(k.name, k.launches, 1e3 * seconds[bound] / k.launches, bound))
    return found


def host_ms(kernels: Sequence[Kernel]) -> float:
    """What the CPU needs to launch a call's kernels."""
    microseconds = 0.0
    for k in kernels:
        if k.launch is None:
            microseconds += MODEL.operator_us
        else:
            microseconds += MODEL.launch_us + MODEL.argument_us * len(k.launch.arguments)
    if any(k.launch is not None for k in kernels):
        microseconds += MODEL.call_us
    return microseconds / 1e3


def call(case: str, contender: str, kernels: Sequence[Kernel], card: Card) -> Prediction:
    """A call of these kernels."""
    found = costs(kernels, card)
    launches = sum(c.launches for c in found)
    busy = sum(c.ms * c.launches for c in found)
    host = host_ms(kernels)
    return total(case, contender, busy, launches, host, _parts(found), _bound(found))


def total(
    case: str, contender: str, busy: float, launches: int, host: float, how: str, bound: str
) -> Prediction:
    """From the kernels' time and the CPU's to the time between events."""
    device = busy + (launches - 1) * MODEL.gap_us / 1e3 + MODEL.event_us / 1e3
    if host > device:
        bound = "host"
    how = f"kernels {busy:.3g} ms, with gaps {device:.3g}; CPU {host:.3g} ms; {how}"
    return Prediction(case, contender, max(device, host), busy, launches, bound, how)


def _parts(found: Sequence[Cost]) -> str:
    # the kernels that take most, with their number
    sums: dict[str, list[float]] = {}
    for c in found:
        entry = sums.setdefault(c.name, [0.0, 0])
        entry[0] += c.ms * c.launches
        entry[1] += c.launches
    most = sorted(sums.items(), key=lambda item: -item[1][0])[:5]
    return ", ".join(f"{name} {ms:.3g} ms x {int(n)}" for name, (ms, n) in most)


def _bound(found: Sequence[Cost]) -> str:
    sums: dict[str, float] = {}
    for c in found:
        sums[c.bound] = sums.get(c.bound, 0.0) + c.ms * c.launches
    return max(sums, key=lambda name: sums[name])


def simple(
    case: Case, contender: str, seconds: float, launches: int, bound: str, how: str,
    operators: int | None = None,
) -> Prediction:  # fmt: skip
    """A figure from a rate."""
    host = (launches if operators is None else operators) * MODEL.operator_us / 1e3
    return total(case.name, contender, 1e3 * seconds, launches, host, how, bound)


def none(case: Case, contender: str, reason: str) -> Prediction:
    """No figure."""
    return Prediction(case.name, contender, None, None, None, "", f"no prediction: {reason}")


# ---- the harvest's cases


def of_card(case: Case, contender: str, card: Card) -> Prediction:
    if case.traffic:
        how = f"{case.traffic / 1e9:.3g} GB at {card.bandwidth / 1e12:.3g} TB/s"
        return simple(case, contender, case.traffic / card.bandwidth, 1, "bandwidth", how)
    if case.operations:
        how = f"{case.operations / 1e12:.3g} TFLOP at {card.tensor / 1e12:.0f} TFLOP/s"
        return simple(case, contender, case.operations / card.tensor, 1, "tensor", how)
    return simple(case, contender, MODEL.kernel_us / 1e6, 1, "launch", "an empty kernel")


def of_attention(case: Case, contender: str, card: Card) -> Prediction:
    from benchmarks import bench_attention_gpu as bench
    from benchmarks import trace

    shape = case.shape
    forward = shape["direction"] == "forward"
    if contender in PUBLISHED:
        return _published_attention(case, contender, card)
    options = {
        "ours, shared": (False, False), "ours, per sample": (True, False),
        "ours, QK norm": (True, True),
    }[contender]  # fmt: skip
    with trace.gpu():
        import torch

        inputs = bench.make_inputs(
            shape["batch"], shape["length"], shape["heads"], "cpu", shape["dtype"], *options
        )
        if forward:
            with torch.no_grad():
                return call(case.name, contender, trace.trace(lambda: bench.ours(inputs)), card)
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        out = None

        def attend() -> None:
            nonlocal out
            out = bench.ours(inputs)

        trace.trace(attend)
        grad = torch.empty_like(inputs["q"])
        kernels = trace.trace(lambda: torch.autograd.grad(out, leaves, grad))
    return call(case.name, contender, kernels, card)


def _published_attention(case: Case, contender: str, card: Card) -> Prediction:
    shape = case.shape
    length, heads, batch = (shape[n] for n in ("length", "heads", "batch"))
    forward = shape["direction"] == "forward"
    rate = PUBLISHED[contender][length][0 if forward else 1]
    pairs = float(heads * length**2)
    half = 2.0
    seconds, launches = 0.0, {"flash": 3}.get(contender, 2)
    if contender == "FlexAttention" and not forward:
        # the matrix part as flash's at the share of its forward; one addition a pair for the table
        rate = PUBLISHED["flash"][length][1] * 0.7
        seconds = batch * pairs / ATOMICS
        extra = f" + {batch * pairs / 1e6:.0f} M atomic additions, {1e3 * seconds:.3g} ms"
    elif contender == "SDPA + bias":
        # the bias gathered (float32), rounded; backward its gradient of each sample is written,
        # summed, and scattered into the table
        if forward:
            nbytes = pairs * (4 + 4 + half + half) + length**2 * 8 * 4
            launches = 8
        else:
            nbytes = pairs * (2 * half * batch + half + 4 + 4)
            seconds = pairs / ATOMICS
            launches = 12
        seconds += nbytes / card.bandwidth
        extra = f" + {nbytes / 1e6:.0f} MB of the bias, together {1e3 * seconds:.3g} ms"
    else:
        extra = ""
    if forward:
        launches = {"flash": 1, "cuDNN, no bias": 1, "FlexAttention": 1}.get(contender, launches)
    seconds += case.operations / (rate * 1e12)
    how = f"{case.operations / 1e9:.3g} GFLOP at {rate:.0f} TFLOP/s{extra}"
    return simple(case, contender, seconds, launches, "tensor", how)


def of_contrastive(case: Case, contender: str, card: Card) -> Prediction:
    from benchmarks import contrastive_peers, trace
    from musiclm_fast import testing
    from musiclm_fast.ops import contrastive_loss
    from musiclm_fast.ops.contrastive import _triton

    shape = case.shape
    kind, depth = shape["kind"], shape["depth"]
    if contender in contrastive_peers.PEERS:
        if contender == "siglip-kernel" and depth == 768:
            how = "its authors' figure for a GH200"
            return simple(case, contender, SIGLIP_768_MS / 1e3, 4, "tensor", how)
        return none(case, contender, "its instructions are not counted and nothing is published "
                    "for this width")  # fmt: skip
    if depth > _triton.MAX_DEPTH:
        return none(case, contender,
                    f"refused: latents of width {depth}, not 1 to {_triton.MAX_DEPTH}")  # fmt: skip
    import torch

    with trace.gpu():
        inputs = testing.contrastive_inputs(shape["batch"], depth, dtype=shape["dtype"])
        if kind != "sigmoid":
            del inputs["bias"]
        leaves = list(inputs.values())

        def step() -> None:
            loss = contrastive_loss(**inputs, kind=kind, backend="triton")
            torch.autograd.grad(loss, leaves)

        kernels = trace.trace(step)
    return call(case.name, contender, kernels, card)


def of_spectrogram(case: Case, contender: str, card: Card) -> Prediction:
    import torch

    from benchmarks import bench_spectrogram_gpu as bench
    from benchmarks import trace

    shape = case.shape
    n_fft, variant = shape["n_fft"], shape["variant"]
    gradient = "gradient" in variant
    if contender == "copy":
        how = f"{case.traffic / 1e6:.0f} MB at {card.bandwidth / 1e12:.3g} TB/s"
        return simple(case, contender, case.traffic / card.bandwidth, 1, "bandwidth", how)
    if contender == "ours":
        values = SPECTROGRAM_MS[n_fft]
        # The backward transforms the frames again and adds their gradients: twice the forward.
        ms = values * (3 if gradient else 1)
        how = f"the review's estimate of the forward, {values:.3g} ms" + (
            ", and twice that for the backward" if gradient else ""
        )
        return simple(case, contender, ms / 1e3, 2 if gradient else 1, "issue", how, 4)
    with trace.gpu():
        wav = torch.randn(shape["clips"], shape["samples"], requires_grad=gradient)
        run = bench.contenders(wav, n_fft, variant, "torch", 1)[contender].build()
        kernels = trace.trace(run)
    return call(case.name, contender, kernels, card)


@functools.cache
def _step_kernels(who: str, mode: str, sizes: Any) -> list[Kernel]:
    from benchmarks import bench_training_step as bench
    from benchmarks import trace

    # The reference's masks read a truth value that must not hold.
    # On a GPU its Adam takes torch's default there, all tensors of a kind at once.
    ours = who == bench.OURS
    foreach = mock.patch.dict(bench.ADAM, {} if ours else {"foreach": True})
    with trace.gpu(truth=ours), foreach:
        run = bench.step(who, sizes, "cpu", mode)
        trace.trace(run)  # makes the optimizer's moments
        return trace.trace(run)


def of_step(case: Case, contender: str, card: Card) -> Prediction:
    shape = case.shape
    mode = shape["mode"]
    compiled = "torch.compile" in mode
    eager = " (bf16)" if "bf16" in mode else ""
    kernels = _step_kernels(shape["who"], eager, shape["sizes"])
    if compiled:
        return _compiled_step(case, contender, kernels, card)
    found = call(case.name, contender, kernels, card)
    if contender.endswith("captured"):
        device = found.kernels_ms + found.launches * MODEL.gap_us / 1e3
        how = f"the eager step's kernels with gaps, without the CPU; {found.how}"
        return Prediction(case.name, contender, device, found.kernels_ms, found.launches,
                          _bound(costs(kernels, card)), how)  # fmt: skip
    return found


def _compiled_step(
    case: Case, contender: str, kernels: Sequence[Kernel], card: Card
) -> Prediction:
    # Products and Triton kernels of the eager step; of the rest, what the roofline's ops move.
    from musiclm_fast.training import cost

    kept = [k for k in kernels if k.launch is not None or k.operations]
    found = costs(kept, card)
    step = case.shape["sizes"].counted()
    ops = [op for op in cost.step_ops(step) if not op.matrix]
    rest = 0.5 * sum(op.traffic for op in ops) / card.bandwidth  # bf16, the counts are float32
    fused = (len(kernels) - len(kept)) // 3  # kernels that are left of three: assumed
    busy = sum(c.ms * c.launches for c in found) + 1e3 * rest
    launches = sum(c.launches for c in found) + fused
    host = host_ms(kept)
    how = f"{_parts(found)}; the rest fused, {1e3 * rest:.3g} ms in {fused} kernels"
    return total(case.name, contender, busy, launches, host, how, _bound(found))


def of_generation(case: Case, contender: str, card: Card) -> Prediction:
    from benchmarks import bench_generation as bench
    from benchmarks import trace

    ours = contender == "ours"
    few, more, tokens = 2, 6, case.shape["tokens"]
    # Ours reads whether no row has ended: yes. Theirs checks its masks: no.
    with trace.gpu(truth=ours):
        theirs, mine = bench.pair()
        generate = bench.ours_generate if ours else bench.theirs_generate
        model = mine if ours else theirs
        first, later = (
            trace.trace(functools.partial(generate, model, n)) for n in (few, more)
        )  # fmt: skip
    sizes = [
        (sum(c.ms * c.launches for c in found), sum(c.launches for c in found), host_ms(kernels))
        for kernels in (first, later)
        for found in [costs(kernels, card)]
    ]
    token = [(b - a) / (more - few) for a, b in zip(*sizes, strict=True)]
    busy, launches, host = (
        a + each * (tokens - few) for a, each in zip(sizes[0], token, strict=True)
    )
    how = (
        f"a token: {token[1]:.0f} kernels, {token[0]:.3g} ms of them, CPU {token[2]:.3g} ms; "
        f"{tokens / max(busy, host) * 1e3:.0f} tokens/s"
    )
    return total(case.name, contender, busy, round(launches), host, how, "launch")


RULES: dict[str, Callable[[Case, str, Card], Prediction]] = {
    "card": of_card, "attention": of_attention, "flex": of_attention,
    "contrastive": of_contrastive, "spectrogram": of_spectrogram, "step": of_step,
    "step_reference": of_step, "step_compiled": of_step, "step_captured": of_step,
    "generation": of_generation,
}  # fmt: skip


def predictions(card: Card) -> list[Prediction]:
    """Of every case and contender, in the harvest's order."""
    from benchmarks.harvest import cases

    found = []
    for case in cases.all_cases():
        for contender in case.contenders:
            print(f"{case.name}: {contender}", file=sys.stderr, flush=True)
            found.append(RULES[case.stage](case, contender, card))
    return found
