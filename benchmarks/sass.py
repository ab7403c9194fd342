"""What the loops of the Triton kernels cost, counted in the machine code; no GPU takes part.

    python -m benchmarks.sass                       every kernel of the ops' usual calls
    python -m benchmarks.sass --kernel forward      those whose name holds it

The launches that a call would make are recorded on meta tensors, compiled for sm_90 with the
assembler that Triton ships, and disassembled. A loop is what a branch backwards encloses. Counts
are instructions of one warp in one turn; ``an element`` divides those of all warps' threads by the
tile that a turn works on. Blocks an SM are what registers, shared memory and warps allow.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from musiclm_fast.ops import _triton_target

TARGET = "sm_90"
# Of one SM of an H100 or H200: CUDA C++ Programming Guide, technical specifications, 9.0.
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65_536, 228 * 1024, 64, 32
RESERVED_BYTES = 1024  # of shared memory, that the system takes for each block

# What an instruction is, by its opcode up to the first full stop; the first that matches.
KINDS = {
    "tensor": r"[HIDQ](G)?MMA",
    "float": r"(FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2)$",
    "mufu": r"MUFU$",
    "convert": r"(F2|I2|F2FP)",
    "cp.async": r"LDGSTS",
    "tma": r"UTMA|UBLKCP",
    "local": r"(LDL|STL)$",
    "global": r"(LDG|STG|RED|ATOM|ATOMG)$",
    "shared": r"(LDS|STS|LDSM|STSM|ATOMS|MOVM)$",
    "generic": r"(LD|ST)$",
    "shuffle": r"(SHFL|REDUX|VOTE)$",
    "barrier": r"(BAR|SYNCS|WARPSYNC|WARPGROUP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ARRIVES)",
    "control": r"(BRA|BRX|BSSY|BSYNC|EXIT|RET|CALL|NOP|YIELD|BREAK|NANOSLEEP)",
    "uniform": r"(U[A-Z0-9]+|R2UR|VOTEU|S2UR)$",
    "imad": r"IMAD",
    "integer": r".*",  # and comparisons, selections, moves: the pipe of half rate
}


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and options of one launch, and its number of programs."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's, with what it is asked for where one kernel serves several ends."""
        ends = {"logsumexp_kernel": ["positive"], "sigmoid_kernel": ["LOSS", "GRADIENT"]}
        name = self.kernel.__name__
        asked = [
            end
            for end in ends.get(name, [])
            if self.arguments[end] is not None and self.arguments[end] is not False
        ]
        return "+".join([name, *asked]).lower()


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly."""

    address: int
    opcode: str  # with its suffixes
    operands: str

    @property
    def kind(self) -> str:
        """A key of ``KINDS``."""
        return _kind(self.opcode.split(".")[0])

    @property
    def target(self) -> int | None:
        """Where a branch leads to."""
        found = re.search(r"\b0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found and self.opcode.split(".")[0] == "BRA" else None


@functools.cache
def _kind(stem: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, stem))


@dataclass(frozen=True, eq=False)
class Loop:
    """Instructions ``[begin, end]`` that a branch backwards encloses.

    Args:
        begin, end: addresses of its first and last instruction.
        depth: loops around it.
        own: its instructions without those of loops inside it.
    """

    begin: int
    end: int
    depth: int
    own: tuple[Instruction, ...]

    @property
    def products(self) -> bool:
        """Whether it uses the tensor cores."""
        return any(i.kind == "tensor" for i in self.own)


@dataclass(frozen=True, eq=False)
class Code:
    """A compiled kernel: its loops by address, the rest, and what a program takes.

    Args:
        name: of the kernel.
        loops: by address.
        outside: instructions in no loop.
        registers: a thread; spilled: bytes of stack and local memory; shared: bytes a program.
        warps: of a program.
    """

    name: str
    loops: tuple[Loop, ...]
    outside: tuple[Instruction, ...]
    registers: int
    spilled: int
    shared: int
    warps: int

    @property
    def blocks(self) -> int:
        """Programs that one SM holds at a time."""
        granted = -(-self.registers * 32 // 256) * 256  # of a warp
        by_registers = REGISTERS // granted // self.warps
        by_shared = SHARED_BYTES // (self.shared + RESERVED_BYTES)
        return min(by_registers, by_shared, WARPS // self.warps, BLOCKS)


LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)


def instructions(text: str) -> list[Instruction]:
    """Of a disassembly of one function."""
    return [Instruction(int(at, 16), op, rest.strip()) for at, op, rest in LINE.findall(text)]


def loops(found: Sequence[Instruction]) -> tuple[tuple[Loop, ...], tuple[Instruction, ...]]:
    """The loops, and the instructions in none.

    Branches back to one place are one loop. The branch to itself at the end of a kernel, and the
    filling after it, are no part of either.
    """
    ends: dict[int, int] = {}
    last = None
    for i in found:
        if i.target == i.address:
            last = i.address
            break
        if i.target is not None and i.target < i.address:
            ends[i.target] = max(ends.get(i.target, 0), i.address)
    kept = [i for i in found if last is None or i.address < last]
    spans = sorted(ends.items())

    def around(begin: int, end: int) -> list[tuple[int, int]]:
        return [s for s in spans if s[0] <= begin and end <= s[1]]

    own: dict[tuple[int, int], list[Instruction]] = {span: [] for span in spans}
    outside = []
    for i in kept:
        holders = around(i.address, i.address)
        if holders:
            own[min(holders, key=lambda s: s[1] - s[0])].append(i)
        else:
            outside.append(i)
    made = tuple(Loop(*span, len(around(*span)) - 1, tuple(own[span])) for span in spans)
    return made, tuple(outside)


def counts(found: Sequence[Instruction]) -> Counter[str]:
    """Instructions by kind."""
    return Counter(i.kind for i in found)


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel for an architecture, specialised as its launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = _triton_target.family(target) == "amd"
    signature, constants, attributes = specialised(launch, amd)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    if amd:
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    options = {**launch.options, "enable_fp_fusion": True}
    return triton.compile(source, target=gpu, options=options)


def specialised(
    launch: Launch, amd: bool = False
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types, constants and attributes of a launch's arguments: what its code depends on."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type_name(value)
        tensor = isinstance(value, torch.Tensor)
        if tensor or (free and type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
        if tensor and amd and value.untyped_storage().nbytes() < 2**31:
            attributes[(index,)].append(["tt.pointer_range", 32])
    return signature, constants, attributes


def _type_name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        names = {
            torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
            torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
        }  # fmt: skip
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def cuobjdump(binary: bytes, option: str) -> str:
    """What Triton's cuobjdump says about a cubin or an object file."""
    from triton.backends.nvidia import compiler as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def cuda_usage(binary: bytes) -> dict[str, dict[str, int]]:
    """By kernel of a cubin or an object file: registers, stack, local memory, where spills go."""
    report = cuobjdump(binary, "--dump-resource-usage")
    functions = re.findall(r"Function (\S+):\n(.+)", report)
    return {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in functions
    }


def code(launch: Launch) -> Code:
    """A launch's kernel, compiled for ``TARGET`` and taken apart."""
    compiled = compile_launch(launch, TARGET)
    cubin = compiled.asm["cubin"]
    usage = next(iter(cuda_usage(cubin).values()))
    found, outside = loops(instructions(cuobjdump(cubin, "--dump-sass")))
    return Code(
        launch.name, found, outside, usage["REG"], usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared, launch.options["num_warps"],
    )  # fmt: skip


def tile(launch: Launch) -> int:
    """Elements that one turn of a launch's innermost loop works on: the product of its two blocks;
    0 of kernels that have none."""
    sizes = [launch.arguments.get(name, 0) for name in ("BLOCK_M", "BLOCK_N")]
    return sizes[0] * sizes[1]


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
