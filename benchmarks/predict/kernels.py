"""The time of one kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

from benchmarks.predict import disassembly, launches
from benchmarks.predict.disassembly import Code, Instruction, Loop
from benchmarks.predict.launches import Launch
from benchmarks.predict.model import MODEL, PIPES, TENSOR_CYCLE, Card
from benchmarks.predict.stored import Cost
from benchmarks.predict.trace import Kernel


@functools.cache
def turn_cycles(loop: Loop) -> dict[str, float]:
    """:func:`cycles` of a turn of a loop."""
    return cycles(loop.turn)


@functools.cache
def outside_cycles(code: Code) -> dict[str, float]:
    """:func:`cycles` of what is in no loop."""
    return cycles(code.outside)


def cycles(loop: Iterable[Instruction]) -> dict[str, float]:
    """Cycles for which one warp's instructions occupy its scheduler's pipes."""
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


def _wavefronts(instruction: Instruction) -> int:
    # of 128 bytes. If each thread of a warp reads 16 bytes of shared memory, as in float32
    # products, half of them read the same data as others.
    suffixes = instruction.opcode.split(".")[1:]
    if instruction.kind in ("global", "cp.async", "generic", "local"):
        return 4 if "128" in suffixes else 2 if "64" in suffixes else 1
    if instruction.kind == "shared":
        return 2 if {"128", "4"} & set(suffixes) else 1
    return 1


def _tensor_operations(instruction: Instruction) -> float:
    # of one warp: HGMMA.64x32x16 is four warps', HMMA.16816 one's
    shape = instruction.opcode.split(".")[1]
    if "x" in shape:
        m, n, k = (int(size) for size in shape.split("x"))
        return 2.0 * m * n * k / 4
    return 2.0 * int(shape[:2]) * int(shape[2:3]) * int(shape[3:])


def turns(launch: Launch, code: Code) -> list[tuple[Loop, float]]:
    """How many turns of each loop a program runs: a rule per kernel."""
    a = launch.arguments
    outer = [loop for loop in code.loops if loop.depth == 0]
    name = launch.kernel.__name__
    if not outer:
        return []
    if name == "forward_kernel":  # the keys' codes, if there are, the last keys, and the others
        rest = a["keys"] % a["BLOCK_N"] / (a["BLOCK_N"] // 2)
        counts = [a["keys"] / 1024, math.ceil(rest), a["keys"] // a["BLOCK_N"]]
        return list(zip(outer[-3:], counts[-len(outer) :], strict=False))
    if name == "backward_kv_kernel":  # the queries' codes, codes that may wrap, and all others
        tiles = a["GROUP"] * math.ceil(a["queries"] / a["BLOCK_M"])
        return list(zip(outer, [a["queries"] / 1024, 0.0, tiles][-len(outer) :], strict=True))
    if name in ("backward_q_kernel", "stored_q_kernel"):  # stored: its third loop writes zeros
        return [
            (outer[0], a["keys"] // a["BLOCK_N"]),
            (outer[1], float(a["keys"] % a["BLOCK_N"] > 0)),
        ]
    if name == "prepare_kernel":  # loops of the few programs that index the codes
        return []
    if name == "backward_table_kernel":
        return _table_turns(launch, code)
    if name == "sums_kernel":  # of each program one: the table's if there is one
        rows = a["parts"] / 8 if a["partial"] is not None else a["q_rows"] / 256
        return [(outer[-1], math.ceil(rows))]
    if name in ("geglu_forward_kernel", "geglu_backward_kernel"):
        return [(outer[0], a["span"])]
    if name == "hyper_backward_kernel":
        return [(loop, a["span"] * (a["count"] if loop.depth else 1)) for loop in code.loops]
    if name == "merge_kernel":  # of its two loops the first, for bounded similarities
        return [(outer[0], float(a["blocks"]))]
    if name in ("logsumexp_kernel", "sigmoid_kernel", "gradient_kernel"):
        # The first two loops are for bounded similarities, as in the harvest: over tiles without a
        # mask, and over those on the diagonal, or over all with labels. Inside: the depth's pieces.
        tiles = math.ceil(a["columns"] / a["BLOCK_N"]) / a["SPLITS"]
        every = a["y_labels"] is not None
        masked = tiles if every else min(tiles, max(a["BLOCK_M"] / a["BLOCK_N"], 1) / a["SPLITS"])
        found = []
        for loop, count in zip(
            outer, [masked] if every else [tiles - masked, masked], strict=False
        ):
            found.append((loop, count))
            for inner in code.loops:
                if inner.depth == 1 and loop.begin <= inner.begin and inner.end <= loop.end:
                    found.append((inner, count * math.ceil(a["D"] / a["BLOCK_D"])))
        return found
    raise ValueError(f"no rule for {name}'s loops in benchmarks/predict/kernels.py, turns()")


def _table_turns(launch: Launch, code: Code) -> list[tuple[Loop, float]]:
    # Codes per sample are taken to be three of four of a grid's: the frame is the grid.
    a = launch.arguments
    outer = [loop for loop in code.loops if loop.depth == 0]
    frame = 1.0 if a["used"] is None else 4 / 3
    tiles = math.ceil(a["queries"] * frame / a["BLOCK_M"])
    tiles *= math.ceil(a["keys"] * frame / a["BLOCK_N"])
    tasks = tiles * a["chunks"] / (launch.programs / a["heads"])
    samples = a["batch"] / a["chunks"]
    span = min(2 * (a["BLOCK_M"] + a["BLOCK_N"]), 2 * a["radius"] + 1)  # of a grid's codes
    pieces = math.ceil(span / a["PIECE"])
    windows = math.ceil(span / a["WINDOW"])
    found = [(loop, a["slots"] / 1024) for loop in outer[:-1]]
    found.append((outer[-1], tasks))
    inside = [loop for loop in code.loops if loop.depth == 1 and loop.begin >= outer[-1].begin]
    found += [(inside[0], tasks * samples), (inside[-1], tasks)]
    for loop in code.loops:
        if loop.depth > 1:
            found.append((loop, tasks * (windows if loop.depth == 2 else pieces)))
    return found


def limits(
    code: Code, programs: int, counted: Iterable[tuple[Loop, float]], traffic: float, card: Card
) -> dict[str, float]:
    """The seconds that one launch takes by each limit alone: of its busiest SM, or of its bytes.

    Args:
        code: of the kernel; programs: of the launch.
        counted: the loops and their turns, see :func:`turns`.
        traffic: bytes.
    """
    total = dict(outside_cycles(code))
    for loop, count in counted:
        for pipe, number in turn_cycles(loop).items():
            total[pipe] = total.get(pipe, 0.0) + count * number
    busiest = math.ceil(programs / card.sms)
    warps = code.warps / MODEL.schedulers
    resident = warps * min(code.blocks, busiest)
    seconds = {}
    for pipe, number in total.items():
        share = MODEL.pipe
        if pipe == "issue":
            share = min(MODEL.issue, MODEL.warp_issue * resident)
        seconds[pipe] = busiest * warps * number / card.clock / share
    if min(code.blocks, busiest) == 1:  # no other program overlaps its products
        seconds["issue"] += seconds.get("tensor", 0.0)
    seconds["bandwidth"] = traffic / card.bandwidth
    seconds["launch"] = MODEL.kernel_us / 1e6
    return seconds


def kernel_cost(launch: Launch, code: Code, traffic: float, card: Card) -> Cost:
    """Time of one launch."""
    counted = turns(launch, code)
    seconds = limits(code, launch.programs, counted, traffic, card)
    bound = max(seconds, key=lambda pipe: seconds[pipe])
    steps = []
    for loop, count in counted:
        step = f" + {count:,.4g} x {len(loop.turn)}"
        if elements := launches.tile(launch):
            step += f" ({32 * code.warps * len(loop.turn) / elements:.1f} an element)"
        steps.append(step if count else "")
    busiest = math.ceil(launch.programs / card.sms)
    how = (
        f"{launch.programs:,} programs of {code.warps} warps, {busiest} on the "
        f"busiest SM, {code.blocks} at a time; a warp: {len(code.outside)}{''.join(steps)}"
        f" instructions; {traffic / 1e6:,.3g} MB; us: "
        + ", ".join(f"{pipe} {1e6 * s:.3g}" for pipe, s in seconds.items() if pipe != "launch")
    )
    return Cost(launch.name, 1, 1e3 * seconds[bound], bound, how)


codes: dict[str, Code] = {}  # by specialisation


def code_of(launch: Launch) -> Code:
    """The code of a launch's kernel, compiled once."""
    key = f"{launch.name} {launches.specialised(launch)} {launch.options}"
    if key not in codes:
        codes[key] = disassembly.code(launch)
    return codes[key]


def moved(kernel: Kernel) -> float:
    """Bytes of a kernel: its tensors, each once. Of these, a table's gradient from a stored dS does
    not read what dS was made from."""
    a = {} if kernel.launch is None else kernel.launch.arguments
    if kernel.name != "backward_table_kernel" or a["ds"] is None:
        return kernel.traffic
    names = ("grad_out", "q", "k", "v", "lse2", "delta", "scaled_table")
    return kernel.traffic - sum(a[name].numel() * a[name].element_size() for name in names)


def costs(kernels: Sequence[Kernel], card: Card) -> list[Cost]:
    """The cost of each kernel of a call."""
    found = []
    for k in kernels:
        if k.launch is not None:
            found.append(kernel_cost(k.launch, code_of(k.launch), moved(k), card))
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
