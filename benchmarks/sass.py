"""Counts the instructions of the Triton kernels' loops in their machine code, without a GPU.

    python -m benchmarks.sass                       every kernel of the ops' usual calls
    python -m benchmarks.sass --kernel forward      those whose name holds it

The launches of a call are recorded on meta tensors, compiled for sm_90 with the assembler that
Triton ships, and disassembled. A backward branch encloses a loop. Counts are instructions
of one warp in one turn; ``an element`` divides those of all warps' threads by the tile that a turn
works on. Blocks an SM are limited by registers, shared memory and warps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.predict.disassembly import code, counts
from benchmarks.predict.launches import TARGET, Launch, tile


def table(launches: Sequence[Launch]) -> str:
    """A block of lines per kernel, a line per loop."""
    lines = []
    for launch in launches:
        c, elements = code(launch), tile(launch)
        lines.append(
            f"{c.name}: {c.registers} registers, {c.spilled} B spilled, {c.shared:,} B shared, "
            f"{c.warps} warps, {c.blocks} blocks an SM; {len(c.outside)} instructions in no loop"
        )
        for loop in c.loops:
            by_kind = counts(loop.own)
            each = 32 * c.warps * len(loop.own) / elements if elements else 0
            parts = ", ".join(f"{k} {n}" for k, n in sorted(by_kind.items(), key=lambda x: -x[1]))
            lines.append(
                f"  {'  ' * loop.depth}{loop.begin:#06x}-{loop.end:#06x}: {len(loop.own)} a turn"
                + (f", {each:.1f} an element" if each else "")
                + f": {parts}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the usual calls."""
    import triton

    from tests.ops import triton_resources

    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass")
    parser.add_argument("--kernel", default="", help="kernels whose name holds this")
    args = parser.parse_args(argv)
    print(f"triton {triton.__version__}, {TARGET}")
    for variant in triton_resources.USUAL.values():
        wanted = [
            launch
            for launch in triton_resources.launches(variant, TARGET)
            if args.kernel in launch.name
        ]
        if wanted:
            print(f"-- {variant}\n{table(wanted)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
