"""What the harvest will measure, predicted before any GPU has run it.

    PYTHONPATH=.venvs/triton-3.6.0 python -m benchmarks.predict              # h100 and h200
    PYTHONPATH=.venvs/triton-3.6.0 python -m benchmarks.predict --card h200  # one of them

writes ``results/<card>-predicted.json`` and the page ``.md`` made from it; :func:`load` reads them.

A kernel takes the longest of: its instructions through the schedulers and pipes of the busiest SM,
its products through the tensor cores, its bytes through the memory. Instructions are counted in the
machine code (:mod:`benchmarks.sass`), kernels and bytes by running each call on fake tensors
(:mod:`benchmarks.trace`). A call takes the longer of its kernels, with the gaps between them, and
the time that the CPU needs to launch them. Every number of the model stands in ``CARDS``,
``MODEL``, ``PIPES`` or ``PUBLISHED``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
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


# Nominal: NVIDIA's data sheets of the SXM cards. Achieved: assumed; the harvest's first stage
# measures a copy and a bf16 product.
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
    argument_us: float = 1.2
    call_us: float = 40.0
    event_us: float = 4.0


MODEL = Model()
SOURCES = {
    "schedulers": "schedulers of an SM, one instruction a cycle each (CUDA C++ Programming Guide)",
    "issue": "share of the cycles in which a scheduler with enough warps issues: assumed",
    "pipe": "share of a pipe's peak that is reached: assumed",
    "warp_issue": "instructions a cycle of one warp alone, which waits for itself: assumed",
    "kernel_us": "least duration of a kernel, us: assumed, as profilers show empty ones",
    "gap_us": "from one queued kernel to the next, us: assumed",
    "operator_us": "CPU time of an eager torch operator, us: assumed",
    "launch_us": "CPU time of a Triton launch beside its arguments, us: assumed",
    "argument_us": "of each of its arguments, us: measured on a shared EPYC with Triton 3.6, an "
    "attention backward on meta tensors: a launch of 35.0 arguments (mean of 32) takes 24.5 us in "
    "this package and 17.8 us in Triton's binder; the launch itself is in launch_us",
    "call_us": "of a custom operator and its autograd, us: assumed",
    "event_us": "of a first kernel on an idle GPU, from the event before it, us: assumed",
}
# Cycles for which an instruction of a warp holds its scheduler's pipe: 32 threads over a quarter of
# the SM's lanes (CUDA C++ Programming Guide, arithmetic throughput, 9.0: 128 float32, 64 integer
# and conversion, 16 special functions, 32 memory). Memory counts once for each 128 bytes.
PIPES = {
    "float": ("float", 1), "imad": ("float", 2), "integer": ("integer", 2),
    "convert": ("integer", 2), "mufu": ("mufu", 8), "global": ("memory", 4),
    "shared": ("memory", 4), "generic": ("memory", 4), "local": ("memory", 4),
    "cp.async": ("memory", 4), "shuffle": ("memory", 4),
}  # fmt: skip
TENSOR_CYCLE = 1024  # bf16 operations a cycle of one scheduler's tensor core: 4,096 an SM
SKIPPED = ("table_edges_kernel", "logsumexp_kernel+positive")  # a branch passes most of a turn
# Peers' TFLOP/s forward and backward at D = 64, by length. Forward, flash and cuDNN: the project's
# review read them off the FlashAttention-3 paper's curves for an H100, of FlashAttention-2 (282 to
# 318; 1,024 lies between) and of FlashAttention-3, which cuDNN is taken to equal. Backward: the
# review's 0.6 ms for flash at 1,024, and the rest assumed around it. Nothing is published for a
# learned table in FlexAttention or for torch's attention with a bias on an H100: assumed.
PUBLISHED: dict[str, dict[int, tuple[float, float]]] = {
    "flash": {512: (282, 250), 1024: (304, 286), 2048: (318, 300)},
    "cuDNN": {512: (333, 300), 1024: (392, 343), 2048: (460, 360)},
    "FlexAttention": {1024: (140, 180), 2048: (145, 190)},
    "SDPA + bias": {512: (110, 75), 1024: (120, 80), 2048: (125, 85)},
}
# siglip-kernel 0.1.1's page: "Hopper (GH200/H100)", B = 65,536, bfloat16; its width, 768, as the
# review found it.
SIGLIP_768_MS = 48.8
ATOMICS = 96 * 1.7e9  # additions a second to distinct words in the L2: one a slice and cycle
# The review of the CUDA spectrogram's code: its estimates, not counts. ms of values, 64 x 10 s.
SPECTROGRAM_MS = {128: 0.262, 512: 0.275}


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


@dataclass(frozen=True)
class Prediction:
    """A figure of the harvest, or why there is none.

    Args:
        case, contender: of the harvest.
        ms: of one call between events; kernels_ms: of its kernels; launches: their number.
        bound: ``tensor``, ``issue``, ``integer``, ``float``, ``mufu``, ``memory`` (instructions),
            ``bandwidth``, ``launch`` (many short kernels) or ``host``.
        how: what it is made of; without a figure, the reason.
        kernels: its Triton kernels, those that cost the same as one.
    """

    case: str
    contender: str
    ms: float | None
    kernels_ms: float | None
    launches: int | None
    bound: str
    how: str
    kernels: Sequence[Cost] = ()


def load(device: str) -> dict[tuple[str, str], Prediction]:
    """The predictions on file for a device by torch's name of it; none for other devices."""
    card = next((c for c in CARDS if c.upper() in re.findall(r"\w+", device.upper())), None)
    if card is None:
        return {}
    found = json.loads((RESULTS / f"{card}-predicted.json").read_text())
    return {(p.case, p.contender): p for p in read(found)}


def read(stored: dict[str, Any]) -> list[Prediction]:
    """The predictions of a file."""
    return [
        Prediction(**{**p, "kernels": [Cost(**k) for k in p["kernels"]]})
        for p in stored["predictions"]
    ]


# ---- one kernel


@functools.cache
def loop_cycles(name: str, loop: Loop) -> tuple[int, dict[str, float]]:
    """Instructions of a turn of a kernel's loop, and :func:`cycles` of them."""
    own = worked(name, loop)
    return len(own), cycles(own)


@functools.cache
def outside_cycles(code: Code) -> dict[str, float]:
    """:func:`cycles` of what is in no loop."""
    return cycles(code.outside)


def cycles(loop: Iterable[Any]) -> dict[str, float]:
    """Cycles for which one warp's instructions hold its scheduler's pipes."""
    found: dict[str, float] = {"issue": 0.0}
    for instruction in loop:
        found["issue"] += 1
        kind = instruction.kind
        if kind == "tensor":
            found["tensor"] = (
                found.get("tensor", 0.0) + _tensor_operations(instruction) / TENSOR_CYCLE
            )
        elif kind in PIPES:
            pipe, each = PIPES[kind]
            found[pipe] = found.get(pipe, 0.0) + each * _wavefronts(instruction)
    return found


def _wavefronts(instruction: Any) -> int:
    # of 128 bytes; where a warp's threads read 16 bytes each of shared memory, as products of
    # float32 do, half of them read what others read
    suffixes = instruction.opcode.split(".")[1:]
    if instruction.kind in ("global", "cp.async", "generic", "local"):
        return 4 if "128" in suffixes else 2 if "64" in suffixes else 1
    if instruction.kind == "shared":
        return 2 if {"128", "4"} & set(suffixes) else 1
    return 1


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
    if not outer:
        return []
    if name == "forward_kernel":
        return [(outer[0], math.ceil(a["keys"] / a["BLOCK_N"]))]
    if name == "backward_kv_kernel":
        return [(outer[0], a["GROUP"] * math.ceil((a["row_end"] - a["row_begin"]) / a["BLOCK_M"]))]
    if name == "backward_q_kernel":
        whole = a["keys"] // a["BLOCK_N"]
        return [(outer[0], whole), (outer[-1], float(a["keys"] % a["BLOCK_N"] > 0))]
    if name == "index_kernel":  # a program goes through one of its two loops
        return [(outer[0], math.ceil(a["queries"] / a["BLOCK"]))]
    if name == "table_gradient_kernel":
        # Chains of one, so the inner loop once a turn, and in those turns alone whose BLOCK_R
        # offsets lead to a query: from a key of a grid, R of the 2R + 1 do.
        count = math.ceil(a["pairs_per_part"] / a["BLOCK_J"])
        found = min(1.0, (a["radius"] + a["BLOCK_R"]) / (2 * a["radius"] + 1))
        return [(loop, count * (found if loop.depth else 1.0)) for loop in code.loops]
    if name == "table_edges_kernel":
        return [(outer[0], math.ceil((a["row_end"] - a["row_begin"]) / a["BLOCK_M"]))]
    if name in ("logsumexp_kernel", "sigmoid_kernel", "gradient_kernel"):
        # gradient_kernel's first loop is that of bounded similarities, which the harvest's are
        return [(outer[0], math.ceil(math.ceil(a["columns"] / a["BLOCK_N"]) / a["SPLITS"]))]
    raise ValueError(f"no rule for the loops of {name}")


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
    from benchmarks import sass

    total = dict(outside_cycles(code))
    steps = []
    for loop, count in turns(launch, code):
        instructions, held = loop_cycles(launch.name, loop)
        for pipe, number in held.items():
            total[pipe] = total.get(pipe, 0.0) + count * number
        if count:
            each = 32 * code.warps * instructions / sass.tile(launch) if sass.tile(launch) else 0
            steps.append(
                f"{count:,.4g} x {instructions}" + (f" ({each:.1f} an element)" if each else "")
            )
    programs = math.ceil(launch.programs / card.sms)  # of the busiest SM
    warps = code.warps / MODEL.schedulers
    resident = warps * min(code.blocks, programs)
    seconds = {}
    for pipe, number in total.items():
        share = MODEL.pipe
        if pipe == "issue":
            share = min(MODEL.issue, MODEL.warp_issue * resident)
        seconds[pipe] = programs * warps * number / card.clock / share
    if min(code.blocks, programs) == 1:  # no other program multiplies meanwhile
        seconds["issue"] += seconds.get("tensor", 0.0)
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
    made = total(case, contender, busy, launches, host, _parts(found), _bound(found))
    equal: dict[Cost, int] = {}
    for c in found:
        if c.how:
            equal[c] = equal.get(c, 0) + 1
    return replace(made, kernels=[replace(c, launches=n) for c, n in equal.items()])


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
    from benchmarks.harvest import cases

    shape = case.shape
    forward = shape["direction"] == "forward"
    if contender in PUBLISHED:
        return _published_attention(case, contender, card)
    with trace.gpu():
        import torch

        inputs = bench.make_inputs(
            shape["batch"],
            shape["length"],
            shape["heads"],
            "cpu",
            shape["dtype"],
            *cases.OPTIONS[contender],
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
        # one addition a pair for the table
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
        launches = {"flash": 1, "cuDNN": 1, "FlexAttention": 1}.get(contender, launches)
    seconds += case.operations / (rate * 1e12)
    how = f"{case.operations / 1e9:.3g} GFLOP at {rate:.0f} TFLOP/s{extra}"
    return simple(case, contender, seconds, launches, "tensor", how)


def of_contrastive(case: Case, contender: str, card: Card) -> Prediction:
    from benchmarks import contrastive_peers, trace
    from benchmarks.harvest import kernels
    from musiclm_fast.ops.contrastive import _triton

    shape = case.shape
    depth = shape["depth"]
    if contender in contrastive_peers.PEERS:
        if contender == "siglip-kernel" and depth == 768:
            how = "its authors' figure for Hopper"
            return simple(case, contender, SIGLIP_768_MS / 1e3, 4, "tensor", how)
        return none(case, contender, "its instructions are not counted and nothing is published "
                    "for this width")  # fmt: skip
    if depth > _triton.MAX_DEPTH:
        return none(case, contender,
                    f"refused: latents of width {depth}, not 1 to {_triton.MAX_DEPTH}")  # fmt: skip
    with trace.gpu():
        found = trace.trace(kernels.loss(shape, "cpu"))
    return call(case.name, contender, found, card)


def of_spectrogram(case: Case, contender: str, card: Card) -> Prediction:
    from benchmarks import trace
    from benchmarks.harvest import kernels

    shape = case.shape
    gradient = "gradient" in shape["variant"]
    if contender == "copy":
        how = f"{case.traffic / 1e6:.0f} MB at {card.bandwidth / 1e12:.3g} TB/s"
        return simple(case, contender, case.traffic / card.bandwidth, 1, "bandwidth", how)
    if contender == "ours":
        values = SPECTROGRAM_MS[shape["n_fft"]]
        # The backward transforms the frames again and adds their gradients: twice the forward.
        ms = values * (3 if gradient else 1)
        how = f"the review's estimate of the forward, {values:.3g} ms" + (
            ", and twice that for the backward" if gradient else ""
        )
        return simple(case, contender, ms / 1e3, 2 if gradient else 1, "issue", how, 4)
    with trace.gpu():
        found = trace.trace(kernels.transform(shape, "cpu", "torch", contender))
    return call(case.name, contender, found, card)


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
        return replace(found, ms=device, bound=_bound(costs(kernels, card)), how=how)
    return found


def _compiled_step(case: Case, contender: str, kernels: Sequence[Kernel], card: Card) -> Prediction:
    # Products and Triton kernels of the eager step; of the rest, what the roofline's ops move.
    from musiclm_fast import cost

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


# ---- seconds of the stages

START_S = 4.0 + 2.0  # torch's import, the CUDA context
COMPILE_S = 0.5  # of one specialisation of a Triton kernel, once: the stages share the cache
SETUP_S = 0.3  # of a contender: its inputs, a profiler's start and end
MODEL_S = 2.0  # to build a model and its optimizer
CALLS = 4 + 3  # to warm up, and under the profiler
EXTRA: dict[str, tuple[float, str]] = {
    "card": (0.0, ""),
    "library": (35.0, "nvcc for one architecture on 16 cores, 30 s at most, and a first import"),
    "parity": (65.0, "690 specialisations and 425 tests, 345 s of CPU on 14 processes, 25 s; their "
               "own starts, 14 at once, 15 s; the tests' kernels, which share the GPU, 25 s"),
    "bits": (12.0, "12 specialisations and 6 x 200 short calls with gradients"),
    "flex": (24.0, "torch.compile of two lengths, forward and backward, 6 s each"),
    "step_captured": (2.0, "three warm-up steps on a side stream and the capture"),
    "step_compiled": (60.0, "torch.compile of the model, forward and backward"),
    "counters": (25.0, "40 launches of about ten passes, saved and restored: 0.6 s each"),
    "sanitizer": (40.0, "twice: the small calls at a fiftieth of their speed, and its own start"),
}  # fmt: skip


def stage_seconds(
    stages: dict[str, list[Prediction]], specialisations: dict[str, int]
) -> dict[str, tuple[float, str]]:
    """Seconds of each stage and what they are made of.

    Args:
        stages: the predictions of each.
        specialisations: of Triton kernels that no case of a stage before has.
    """
    from benchmarks.harvest import cases
    from benchmarks.harvest.__main__ import STAGES

    budgets = {case.stage: case.budget for case in cases.all_cases()}
    found = {}
    for stage in STAGES:
        parts = [f"start {START_S:.0f}"]
        total_s = START_S
        measured = [p.ms / 1e3 for p in stages.get(stage, ()) if p.ms is not None]
        if measured:
            each = sum(max(budgets[stage], 5 * s) + CALLS * s + SETUP_S for s in measured)
            if stage == "generation":  # twice: warm, then timed
                each = sum(2 * s for s in measured)
            if stage.startswith(("step", "generation")):
                each += MODEL_S * len(measured)
            total_s += each
            parts.append(f"{len(measured)} contenders {each:.1f}")
        if compiled := specialisations.get(stage):
            total_s += compiled * COMPILE_S
            parts.append(f"{compiled} specialisations {compiled * COMPILE_S:.1f}")
        extra, reason = EXTRA.get(stage, (0.0, ""))
        if extra:
            total_s += extra
            parts.append(f"{reason} {extra:.0f}")
        found[stage] = (round(total_s, 1), "; ".join(parts))
    return found


def by_stage(found: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by the stage of their case."""
    from benchmarks.harvest import cases

    wanted = {(c.name, who): c.stage for c in cases.all_cases() for who in c.contenders}
    stages: dict[str, list[Prediction]] = {}
    for p in found:
        stages.setdefault(wanted[p.case, p.contender], []).append(p)
    return stages


def predictions(card: Card) -> tuple[list[Prediction], dict[str, int]]:
    """Of every case and contender, in the harvest's order; and how many specialisations of Triton
    kernels each stage has that none before has."""
    from benchmarks.harvest import cases

    _codes.clear()
    found = []
    compiled: dict[str, int] = {}
    for case in cases.all_cases():
        for contender in case.contenders:
            print(f"{case.name}: {contender}", file=sys.stderr, flush=True)
            before = len(_codes)
            found.append(RULES[case.stage](case, contender, card))
            compiled[case.stage] = compiled.get(case.stage, 0) + len(_codes) - before
    return found, compiled


# ---- the files


def rounded(p: Prediction) -> Prediction:
    """With as many digits as mean something."""

    def four(x: float | None) -> float | None:
        return None if x is None else float(f"{x:.4g}")

    kernels = [replace(k, ms=four(k.ms)) for k in p.kernels]
    return replace(p, ms=four(p.ms), kernels_ms=four(p.kernels_ms), kernels=kernels)


def make(name: str) -> dict[str, Any]:
    """What the file of a card holds."""
    import torch
    import triton

    found, compiled = predictions(CARDS[name])
    found = [rounded(p) for p in found]
    return {
        "card": asdict(CARDS[name]), "model": asdict(MODEL), "triton": triton.__version__,
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
        "specialisations": compiled,
        "stages": stage_seconds(by_stage(found), compiled),
        "predictions": [asdict(p) for p in found],
        "other": None,
    }  # fmt: skip


def add_other(stored: dict[str, Any], name: str) -> None:
    """Put what another Triton changes into a file's content: kernels' ms that differ by 1%."""
    import triton

    changed = []
    for p, before in zip(predictions(CARDS[name])[0], read(stored), strict=True):
        if p.kernels_ms and abs(p.kernels_ms / before.kernels_ms - 1) > 0.01:
            changed.append([p.case, p.contender, float(f"{p.kernels_ms:.4g}")])
    stored["other"] = {"triton": triton.__version__, "kernels_ms": changed}


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    ]


def page(stored: dict[str, Any]) -> str:
    """The page of a file's content."""
    from benchmarks.harvest import cases

    card = Card(**stored["card"])
    model = stored["model"]
    found = {(p.case, p.contender): p for p in read(stored)}
    lines = [
        f"# {card.name}, predicted",
        "",
        f"Written by `python -m benchmarks.predict` on {stored['date']} from the code of Triton "
        f"{stored['triton']} for sm_90 and torch {stored['torch']}'s operators; no GPU has run "
        "anything here. `python -m benchmarks.harvest` measures the same cases.",
        "",
        "## The model",
        "",
        "A Triton kernel takes the longest of three. **Instructions**: programs of the busiest "
        "SM x warps of a program / schedulers x cycles of a warp / clock / share reached, where "
        "a warp's cycles are its instructions (limit *issue*), or the cycles for which they hold "
        "one pipe (*integer*, *float*, *mufu*, *memory*) or the tensor core (*tensor*). *issue* "
        f"reaches the share {model['issue']:g}, or {model['warp_issue']:g} times the warps of a "
        f"scheduler where that is less; a pipe reaches {model['pipe']:g}. Where an SM holds one "
        "program at a time, its products and the rest take turns: *tensor* is added to *issue*. "
        "**Bytes**: its tensors, each once, over the bandwidth reached (*bandwidth*). **A least "
        "duration** (*launch*). Operators of torch have no counted instructions: their bytes or "
        "products alone. A call takes the longer of its kernels with gaps and of the CPU "
        "(*host*).",
        "",
        "*how* of a kernel has the factors: programs, those of the busiest SM, how many an SM "
        "holds at a time, a warp's instructions outside loops + turns x instructions of a turn, "
        "the bytes, and what each limit alone would take. "
        "`python -m benchmarks.sass` prints the loops by kind of instruction.",
        "",
        f"The card: {card.sms} SMs at {card.clock / 1e9:.2f} GHz; bandwidth "
        f"{card.bandwidth / 1e12:.3g} of nominal {card.nominal_bandwidth / 1e12:.3g} TB/s; bf16 "
        f"products {card.tensor / 1e12:.0f} of nominal {card.nominal_tensor / 1e12:.0f} TFLOP/s; "
        f"float32 products {card.float32 / 1e12:.0f} TFLOP/s.",
        "",
        *_table(["constant", "value", "what it is, and from where"],
                [[name, f"{model[name]:g}", SOURCES[name]] for name in model]),
        "",
        "Cycles of a pipe an instruction: "
        + ", ".join(f"{kind} {each}" for kind, (_, each) in PIPES.items())
        + f"; tensor: operations of a warp / {TENSOR_CYCLE}.",
        "",
        "Weakest points: the share of issue slots that is reached (every attention and contrastive "
        "figure goes with it); the CPU's time a launch, which decides the short steps and "
        "generation; what the L2 saves, which is counted as memory traffic; bank conflicts and "
        "uncoalesced gathers, which are not counted; the spectrogram's kernels, of which nothing "
        "is counted: estimates of a review of their code; peers' rates, read off others' curves or "
        "assumed (`PUBLISHED` in the code says which); what torch.compile fuses, assumed. Ours in "
        "the steps has the spectrogram's definition in torch, some 24 kernels for one.",
        "",
        "## Seconds of the stages, on 16 cores",
        "",
        f"Starts ({START_S:g} s: torch's import, the CUDA context), {COMPILE_S:g} s a "
        "specialisation and what is said in words are assumed; measuring follows from the figures "
        "below and the time for which a contender is repeated.",
        "",
        *_table(["stage", "s", "made of"],
                [[n, f"{s:.0f}", how] for n, (s, how) in stored["stages"].items()]
                + [["all", f"{sum(s for s, _ in stored['stages'].values()):.0f}", ""]]),
    ]  # fmt: skip
    other = stored["other"]
    changed = {(c, w): ms for c, w, ms in other["kernels_ms"]} if other else {}
    stages: dict[str, list[Case]] = {}
    for case in cases.all_cases():
        stages.setdefault(case.stage, []).append(case)
    for stage, members in stages.items():
        heads = ["case", "contender", "ms", "kernels ms", "launches", "limit", "rate",
                 "of nominal", "how"]  # fmt: skip
        if other:
            heads.insert(4, f"on Triton {other['triton']}")
        rows, kernels = [], []
        for case in members:
            for who in case.contenders:
                p = found[case.name, who]
                row = [case.name, who, _number(p.ms), _number(p.kernels_ms),
                       _number(p.launches), p.bound, *_share(case, p, card), p.how]  # fmt: skip
                if other:
                    row.insert(4, _number(changed.get((case.name, who))))
                rows.append(row)
                if stage in ("attention", "contrastive"):
                    kernels += [[case.name, who, k.name, f"{k.launches}", _number(1e3 * k.ms),
                                 k.bound, k.how] for k in p.kernels]  # fmt: skip
        lines += ["", f"## {stage}", "", *_table(heads, rows)]
        if kernels:
            lines += [
                "", "Their Triton kernels, one launch each:", "",
                *_table(["case", "contender", "kernel", "launches", "us", "limit", "how"], kernels),
            ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _share(case: Case, p: Prediction, card: Card) -> tuple[str, str]:
    # what the harvest calls TFLOP/s or GB/s, and that over the card's nominal rate
    if not p.kernels_ms:
        return "", ""
    if case.operations:
        rate = case.operations / p.kernels_ms * 1e3
        return f"{rate / 1e12:.3g} TFLOP/s", f"{rate / card.nominal_tensor:.1%}"
    if case.traffic:
        rate = case.traffic / p.kernels_ms * 1e3
        return f"{rate / 1e9:.4g} GB/s", f"{rate / card.nominal_bandwidth:.1%}"
    return "", ""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict")
    parser.add_argument("--card", choices=list(CARDS), help="one card; all without it")
    parser.add_argument(
        "--other", action="store_true",
        help="keep the files' figures and add what this environment's Triton changes",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for name in [args.card] if args.card else CARDS:
        path = RESULTS / f"{name}-predicted.json"
        if args.other:
            stored = json.loads(path.read_text())
            add_other(stored, name)
        else:
            stored = make(name)
        text = json.dumps(stored, indent=1) + "\n"
        path.write_text(text)
        path.with_suffix(".md").write_text(page(json.loads(text)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
