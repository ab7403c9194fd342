"""The loops and instructions of a kernel's machine code."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.predict.launches import TARGET, Launch, compile_launch, cuda_usage, cuobjdump

# One SM of an H100 or H200: CUDA C++ Programming Guide, technical specifications, 9.0.
REGISTERS, SHARED_BYTES, WARPS, BLOCKS = 65_536, 228 * 1024, 64, 32
RESERVED_BYTES = 1024  # of shared memory, reserved for each block

# The kind of an instruction, by its opcode up to the first full stop; the first match counts.
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
    "integer": r".*",  # and comparisons, selections, moves: the half-rate pipe
}


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
        """Target address of a branch."""
        found = re.search(r"\b0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found and self.opcode.split(".")[0] == "BRA" else None


@functools.cache
def _kind(stem: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, stem))


@dataclass(frozen=True, eq=False)
class Loop:
    """Instructions ``[begin, end]`` that a backward branch encloses.

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
    """A compiled kernel: its loops by address, the rest, and a program's resources.

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
    """The instructions in the disassembly of one function."""
    return [Instruction(int(at, 16), op, rest.strip()) for at, op, rest in LINE.findall(text)]


def loops(found: Sequence[Instruction]) -> tuple[tuple[Loop, ...], tuple[Instruction, ...]]:
    """The loops, and the instructions in none.

    Branches back to the same address form one loop. The branch to itself at the end of a kernel and
    the padding after it belong to neither.
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


def code(launch: Launch) -> Code:
    """A launch's kernel, compiled for ``TARGET`` and disassembled."""
    compiled = compile_launch(launch, TARGET)
    cubin = compiled.asm["cubin"]
    usage = next(iter(cuda_usage(cubin).values()))
    found, outside = loops(instructions(cuobjdump(cubin, "--dump-sass")))
    return Code(
        launch.name, found, outside, usage["REG"], usage["STACK"] + usage["LOCAL"],
        compiled.metadata.shared, launch.options["num_warps"],
    )  # fmt: skip
