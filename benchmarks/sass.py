"""Counts the instructions of the GPU kernels in their machine code, without a GPU.

    python -m benchmarks.sass                       every kernel of the ops' usual calls
    python -m benchmarks.sass --op attention --kernel forward --card h200
    python -m benchmarks.sass --json                the same, for programs
    python -m benchmarks.sass --markdown .venvs/triton-3.6.0
        writes the tables in the ops' READMEs and the figures that a test holds the kernels to
        (benchmarks/sass.json), by this environment's Triton and by those in the folders

The launches of a usual call (tests/ops/triton_resources.py, ``USUAL``) are recorded on meta
tensors, compiled for sm_90 with the assembler that Triton ships, and disassembled. nvcc compiles
csrc/spectrogram/spectrogram.cu for sm_90 (tests/ops/cuda_resources.py, ``USUAL``).

A Triton kernel's loop is counted by its shortest path, what a warp issues in most turns; the number
of all its instructions follows where it differs. The CUDA file's loops are counted whole. An
instruction whose predicate does not hold counts: it takes its slot. What a pipelined loop does
before its first turn and after its last is in no loop. ``An element`` divides the instructions of
all warps' threads by the tile that a turn works on. Accesses are named with the bits that a thread
moves. Blocks an SM are limited by registers, warps and, in Triton's kernels, shared memory. Times
are those of all of the kernel's launches in the call by each limit alone, from the cost model in
benchmarks/predict. The issue limit needs the number of turns: a rule in ``turns``,
benchmarks/predict/kernels.py, or for CUDA in ``USUAL``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import tables
from benchmarks.predict import CARDS, Card
from benchmarks.predict.disassembly import Code, Instruction, counts
from musiclm_fast._wording import plural

if TYPE_CHECKING:
    from benchmarks.predict.launches import Launch

ROOT = Path(__file__).parents[1]
STORED = Path(__file__).with_suffix(".json")
MARKER = "<!-- python -m benchmarks.sass --markdown -->\n"
CUDA_OP = "spectrogram"  # the op whose kernels are in CUDA C++


@dataclass(frozen=True)
class Part:
    """A loop of a kernel, or what is in none.

    Args:
        place: addresses of its first and last instruction.
        depth: loops around it.
        turn: instructions of a warp in one turn; most: with every branch.
        element: instructions an element; 0 if the tile is unknown.
        guarded: instructions with a predicate.
        kinds: instructions of a turn by kind; products, accesses: by opcode and by width.
    """

    place: str
    depth: int
    turn: int
    most: int
    element: float
    guarded: int
    kinds: dict[str, int]
    products: dict[str, int]
    accesses: dict[str, int]


@dataclass(frozen=True)
class Kernel:
    """A kernel of a usual call.

    Args:
        op, call: which op and call; tool: the compiler and its version.
        launches: of this kernel in the call; programs: of all of them.
        registers: a thread; spilled: bytes of stack and local memory; shared: bytes of a block
            that the compiler knows of; blocks: that an SM holds.
        us: of all its launches by each limit alone, on the card.
        unknown: why there is no issue limit.
    """

    op: str
    call: str
    tool: str
    name: str
    launches: int
    programs: int
    warps: int
    registers: int
    spilled: int
    shared: int
    blocks: int
    loops: list[Part]
    outside: Part
    us: dict[str, float]
    unknown: str = ""

    @property
    def bound(self) -> str:
        """The limit that takes longest."""
        return max(self.us, key=lambda limit: self.us[limit])


def part(
    turn: Sequence[Instruction], every: Sequence[Instruction], depth: int, threads: int, tile: int
) -> Part:
    """Counts of instructions; ``every`` has those of all branches."""
    return Part(
        f"{every[0].address:#06x}-{every[-1].address:#06x}" if every else "",
        depth, len(turn), len(every), round(threads * len(turn) / tile, 3) if tile else 0.0,
        sum(bool(i.guard) for i in turn), dict(counts(turn).most_common()),
        dict(Counter(i.opcode for i in turn if i.kind == "tensor")),
        dict(Counter(i.access for i in turn if i.access).most_common()),
    )  # fmt: skip


def kernel_of(
    op: str, call: str, tool: str, launches: int, programs: int, code: Code, tile: int,
    us: dict[str, float], unknown: str,
) -> Kernel:  # fmt: skip
    """A kernel's counts."""
    threads = 32 * code.warps
    return Kernel(
        op, call, tool, code.name, launches, programs, code.warps, code.registers, code.spilled,
        code.shared, code.blocks,
        [part(loop.turn, loop.own, loop.depth, threads, tile) for loop in code.loops],
        part(code.outside, code.outside, 0, threads, 0),
        {limit: float(f"{x:.3g}") for limit, x in us.items()}, unknown,
    )  # fmt: skip


def triton_kernels(op: str, card: Card, name: str = "") -> Iterator[Kernel]:
    """The Triton kernels of an op's usual call whose name holds a text."""
    from benchmarks.predict.launches import TARGET
    from tests.ops import triton_resources

    variant = triton_resources.USUAL[op]
    found: dict[str, list[Launch]] = {}
    for launch in triton_resources.every_launch(variant, TARGET):
        if name in launch.name and launch.programs:
            found.setdefault(launch.name, []).append(launch)
    for launches in found.values():
        yield triton_kernel(op, str(variant), launches, card)


def triton_kernel(op: str, call: str, launches: Sequence[Launch], card: Card) -> Kernel:
    """A Triton kernel from its launches in a call, with the code of the first."""
    import triton

    from benchmarks.predict import kernels, trace
    from benchmarks.predict.launches import tile

    us: Counter[str] = Counter()
    unknown = ""
    for launch in launches:
        code, traffic = kernels.code_of(launch), kernels.moved(trace.of_launch(launch))
        try:
            counted = kernels.turns(launch, code)
            seconds = kernels.limits(code, launch.programs, counted, traffic, card)
        except ValueError as error:
            unknown, seconds = str(error), {"bandwidth": traffic / card.bandwidth}
        us.update({limit: 1e6 * s for limit, s in seconds.items()})
    programs = sum(launch.programs for launch in launches)
    return kernel_of(
        op, call, f"Triton {triton.__version__}", len(launches), programs,
        kernels.code_of(launches[0]), tile(launches[0]), us, unknown,
    )  # fmt: skip


def cuda_kernels(card: Card, name: str = "") -> Iterator[Kernel]:
    """The spectrogram's CUDA kernels whose name holds a text; none without nvcc."""
    from benchmarks import bench_spectrogram, bench_spectrogram_gpu
    from benchmarks.predict.disassembly import read
    from benchmarks.predict.kernels import limits
    from benchmarks.predict.launches import TARGET, cuda_usage, cuobjdump
    from tests.ops import cuda_resources

    if cuda_resources.nvcc() is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        binary = cuda_resources.compile_spectrogram(TARGET, Path(folder))
    symbols = {cuda_resources.readable(s): (s, usage) for s, usage in cuda_usage(binary).items()}
    clips, samples = bench_spectrogram.CLIPS, bench_spectrogram.SAMPLES
    wanted = []
    for beginning, usual in cuda_resources.USUAL.items():
        named = [kernel for kernel in symbols if kernel.startswith(beginning)]
        if not named:
            raise ValueError(
                f"no {beginning} in spectrogram.cu: tests/ops/cuda_resources.py, USUAL, names it; "
                f"there are {', '.join(sorted(symbols))}"
            )
        wanted += [(kernel, usual) for kernel in sorted(named) if name in kernel]
    for kernel, usual in wanted:
        symbol, usage = symbols[kernel]
        disassembled = cuobjdump(binary, "--dump-sass", "--function", symbol)
        code = read(kernel, disassembled, usage, 0, usual.warps)
        code = replace(code, loops=tuple(replace(loop, turn=loop.own) for loop in code.loops))
        traffic = bench_spectrogram_gpu.traffic(clips, samples, usual.n_fft, "values")
        if kernel.startswith("backward"):
            both = bench_spectrogram_gpu.traffic(clips, samples, usual.n_fft, "gradient")
            traffic = both - traffic
        hop = bench_spectrogram.FRONT_ENDS[usual.n_fft]["hop_length"]
        programs = clips * -(-(samples // hop + 1) // usual.frames)
        unknown, seconds = "", {"bandwidth": traffic / card.bandwidth}
        if len(usual.turns) == len(code.loops):
            counted = zip(code.loops, usual.turns, strict=True)
            seconds = limits(code, programs, counted, traffic, card)
        else:
            unknown = f"turns of {len(usual.turns)} of {len(code.loops)} loops are counted"
        yield kernel_of(
            CUDA_OP, f"spectrogram n_fft={usual.n_fft}, {clips} x {samples / 16_000:g} s",
            f"nvcc {cuda_resources.version()}", 1, programs, code, 0,
            {limit: 1e6 * s for limit, s in seconds.items()}, unknown,
        )  # fmt: skip


def ops() -> list[str]:
    """The ops with kernels for a GPU."""
    from tests.ops import triton_resources

    return [*triton_resources.USUAL, CUDA_OP]


def kernels_of(op: str, card: Card, name: str = "") -> Iterator[Kernel]:
    """The kernels of an op's usual call whose name holds a text."""
    return cuda_kernels(card, name) if op == CUDA_OP else triton_kernels(op, card, name)


def listed(numbers: dict[str, Any]) -> str:
    """``16 LDG.16, 3 LDGSTS.128``."""
    return ", ".join(f"{n} {name}" for name, n in numbers.items())


def text(kernel: Kernel) -> str:
    """A block of lines of a kernel, two lines a loop."""
    k = kernel
    lines = [
        f"{k.name}: {k.registers} registers, {k.spilled} B spilled, {k.shared:,} B shared, "
        f"{k.warps} warps, {plural(k.blocks, 'block')} an SM",
        f"  {plural(k.launches, 'launch', 'launches')}, {k.programs:,} programs: "
        + ", ".join(f"{limit} {x:g} us" for limit, x in k.us.items())
        + f"; limit {k.bound}"
        + (f" ({k.unknown})" if k.unknown else ""),
    ]
    for p in [*k.loops, k.outside]:
        indent = "  " * (p.depth + 1)
        kinds = ", ".join(
            f"{kind} {n / p.turn * p.element:.2f}" if p.element else f"{kind} {n}"
            for kind, n in p.kinds.items()
        )
        lines += [
            f"{indent}{'in no loop' if p is k.outside else p.place}: {p.turn} instructions"
            + (f" of {p.most}" if p.most != p.turn else "")
            + (f", {p.guarded} guarded" if p.guarded else "")
            + (f", {p.element:.1f} an element" if p.element else "")
            + f": {kinds}",
            f"{indent}  {listed(p.products | p.accesses) or 'no product, no access'}",
        ]
    return "\n".join(lines)


def markdown(op: str, found: Iterable[Kernel]) -> str:
    """The table of an op's README: a row per loop of 64 instructions or more, columns per
    compiler."""
    by_name: dict[str, dict[str, Kernel]] = {}
    tools: dict[str, None] = {}
    for kernel in found:
        if kernel.op == op:
            by_name.setdefault(kernel.name, {})[kernel.tool] = kernel
            tools[kernel.tool] = None
    heads = ["kernel, loop"]
    for tool in tools:
        heads += [f"{tool}: instructions", "products and accesses", "resources", "us"]
    rows = []
    for name, by_tool in by_name.items():
        count = max(len(_long(k)) for k in by_tool.values())
        for n in range(count):
            row = [name if n == 0 else f"{name}, {n + 1}"]
            for tool in tools:
                row += _cells(by_tool.get(tool), n)
            rows.append(row)
    return tables.markdown(heads, rows)


def _long(k: Kernel) -> list[Part]:
    # the loops that a README shows; of a kernel without one, what is in none
    return [p for p in k.loops if p.turn >= 64] or [k.outside]


def _cells(k: Kernel | None, n: int) -> list[str]:
    if k is None or n >= len(_long(k)):
        return [""] * 4
    p = _long(k)[n]
    each = f"{p.element:.1f} an element" if p.element else f"{p.turn} a turn"
    if p is k.outside:
        each = f"{p.turn}, no loop"
    cells = [each, listed(p.products | p.accesses)]
    if n:
        return [*cells, "", ""]
    limits = ["issue", "tensor", "bandwidth"]
    times = " / ".join(f"{k.us[limit]:g}" if limit in k.us else "-" for limit in limits)
    return [*cells, f"{k.registers} / {k.blocks} / {k.spilled}", times]


def load() -> list[Kernel]:
    """The kernels on file."""
    return [kernel(row) for row in json.loads(STORED.read_text())]


def kernel(row: dict[str, Any]) -> Kernel:
    """A kernel from its JSON."""
    loops = [Part(**p) for p in row["loops"]]
    return Kernel(**{**row, "loops": loops, "outside": Part(**row["outside"])})


def write(folders: Sequence[str]) -> None:
    """The stored figures and the tables in the READMEs, by the Tritons in the folders and by this
    environment's. Without nvcc the CUDA file's stay as they are."""
    rows = []
    for folder in [*folders, ""]:
        path = os.pathsep.join(filter(None, [folder and str(Path(folder).resolve()), str(ROOT)]))
        wanted = [op for op in ops() if op != CUDA_OP or not folder]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sass", "--json", "--op", *wanted], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        rows += json.loads(done.stdout)
    if not any(row["op"] == CUDA_OP for row in rows):
        print(f"no nvcc: {CUDA_OP} stays as it is", file=sys.stderr)
        rows += [asdict(k) for k in load() if k.op == CUDA_OP]
    STORED.write_text(json.dumps(rows, indent=1) + "\n")
    for op in ops():
        tables.replace(readme(op), MARKER, markdown(op, load()))


def readme(op: str) -> Path:
    return ROOT / "musiclm_fast" / "ops" / op / "README.md"


def worse(found: Kernel, on_file: Sequence[Kernel], share: float = 0.1) -> list[str]:
    """What a kernel needs more of than on file: instructions of a loop by a share, registers that
    cost a block an SM, spills."""
    again = "if it is meant, run python -m benchmarks.sass --markdown (CONTRIBUTING.md)"
    same = [(k.op, k.name, k.tool) == (found.op, found.name, found.tool) for k in on_file]
    if not any(same):
        return [f"{found.op}, {found.name}, {found.tool}: not on file; {again}"]
    stored = on_file[same.index(True)]
    problems = []
    if found.spilled > stored.spilled:
        problems.append(f"{found.spilled} B spilled, {stored.spilled} on file")
    if found.blocks < stored.blocks:
        problems.append(f"{found.blocks} blocks an SM, {stored.blocks} on file")
    if len(found.loops) != len(stored.loops):
        problems.append(f"{len(found.loops)} loops, {len(stored.loops)} on file")
    for n, (now, then) in enumerate(zip(found.loops, stored.loops, strict=False), 1):
        new, old = (p.element or p.turn for p in (now, then))
        if new > (1 + share) * old:
            problems.append(f"loop {n}: {new:g} instructions an element, {old:g} on file")
    return [f"{found.op}, {found.name}, {found.tool}: {p}; {again}" for p in problems]


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass")
    parser.add_argument("--op", nargs="+", choices=ops(), default=ops(), help="ops")
    parser.add_argument("--kernel", default="", help="kernels whose name holds this")
    parser.add_argument("--card", choices=list(CARDS), default="h100", help="of the times")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--markdown", nargs="*", metavar="FOLDER", help="into the READMEs and the stored figures"
    )
    args = parser.parse_args(argv)
    if args.markdown is not None:
        write(args.markdown)
        return 0
    found = []
    call = None
    for op in args.op:
        for kernel in kernels_of(op, CARDS[args.card], args.kernel):
            found.append(asdict(kernel))
            if args.json:
                continue
            if call != (kernel.tool, kernel.call):
                call = kernel.tool, kernel.call
                print(f"-- {kernel.call}: {kernel.tool}, sm_90, {CARDS[args.card].name}")
            print(text(kernel), flush=True)
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
