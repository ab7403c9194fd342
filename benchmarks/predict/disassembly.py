"""The loops and instructions of a kernel's machine code."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
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
    guard: str = ""  # ``@!P1``: its predicate; it takes its slot whether it holds or not

    @property
    def stem(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """A key of ``KINDS``."""
        return _kind(self.stem)

    @property
    def target(self) -> int | None:
        """Target address of a branch."""
        found = re.search(r"\b0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found and self.stem == "BRA" else None

    @property
    def access(self) -> str:
        """``LDG.128``: an access to memory with the bits that a thread moves; empty for others."""
        suffixes = self.opcode.split(".")[1:]
        if re.match(r"UTMA|UBLKCP", self.stem):
            return "TMA"
        if self.stem in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits: 32 bits a thread each
            return f"{self.stem}.{32 * next((int(s) for s in suffixes if s in '24'), 1)}"
        if re.fullmatch(r"(LD|ST)[GSL]?|LDGSTS|RED|ATOM[GS]?", self.stem):
            widths = (re.fullmatch(r"[US]?(8|16|32|64|128)", s) for s in suffixes)
            return f"{self.stem}.{next((w[1] for w in widths if w), '32')}"
        return ""


@functools.cache
def _kind(stem: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, stem))


@dataclass(frozen=True, eq=False)
class Loop:
    """A natural loop: the blocks from which a branch leads back to one that precedes them always.

    Args:
        begin, end: addresses of its first and last instruction.
        depth: loops around it.
        own: its instructions without those of loops inside it.
        turn: those of the shortest path through it that passes the loops inside it. What a branch
            leads to in few turns, as the diagonal's tiles, counts in ``own`` alone.
    """

    begin: int
    end: int
    depth: int
    own: tuple[Instruction, ...]
    turn: tuple[Instruction, ...]


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


LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);", re.M)


def instructions(text: str) -> list[Instruction]:
    """The instructions in the disassembly of one function."""
    return [
        Instruction(int(at, 16), op, rest.strip(), guard)
        for at, guard, op, rest in LINE.findall(text)
    ]


def loops(found: Sequence[Instruction]) -> tuple[tuple[Loop, ...], tuple[Instruction, ...]]:
    """The loops by address, and the instructions in none.

    What no path from the first instruction reaches is left out: the padding at the end, the
    subroutines behind a CALL (divisions of denormal numbers) and the blocks behind a BRA.DIV, for a
    warp that has diverged. A wait for a barrier that spins is no loop.
    """
    blocks = _blocks(found)
    after = {begin: _successors(block, blocks) for begin, block in blocks.items()}
    order, dominator = _dominators(found[0].address, after)
    members: dict[int, set[int]] = {}  # of a loop, by its header
    before: dict[int, list[int]] = {begin: [] for begin in order}
    for begin in order:
        for target in after[begin]:
            before[target].append(begin)
    for latch in order:
        for header in after[latch]:
            if not _dominates(header, latch, dominator):
                continue
            body, waiting = {header}, [latch]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += before[block]
            if not _spins(i for block in body for i in blocks[block]):
                members.setdefault(header, set()).update(body)
    inner = {  # the smallest loop around a block
        block: min((h for h in members if block in members[h]), key=lambda h: len(members[h]))
        for block in set().union(*members.values())
    }
    made = []
    for header, body in members.items():
        own = {block: blocks[block] if inner[block] == header else [] for block in body}
        path = _shortest(header, own, {h for h in members if h in body - {header}}, after, order)
        addresses = [i.address for block in body for i in blocks[block]]
        depth = sum(header in other for other in members.values()) - 1
        made.append(Loop(
            min(addresses), max(addresses), depth,
            tuple(i for block in sorted(body) for i in own[block]),
            tuple(i for block in sorted(path) for i in own[block]),
        ))  # fmt: skip
    outside = (i for block in sorted(order) if block not in inner for i in blocks[block])
    return tuple(sorted(made, key=lambda loop: (loop.begin, loop.depth))), tuple(outside)


def _shortest(
    header: int,
    own: dict[int, list[Instruction]],
    within: set[int],
    after: dict[int, list[int]],
    order: Sequence[int],
) -> set[int]:
    # Blocks of the shortest path from the header back to it, through the headers inside where one
    # leads to the next. In reverse postorder every block follows those that lead to it.
    body = [block for block in order if block in own]

    def paths(start: int) -> dict[int, tuple[int, int | None]]:
        found: dict[int, tuple[int, int | None]] = {start: (len(own[start]), None)}
        for block in body[body.index(start) :]:
            for target in after[block] if block in found else ():
                if target in own and target != header:
                    length = found[block][0] + len(own[target])
                    if length < found.get(target, (length + 1,))[0]:
                        found[target] = (length, block)
        return found

    def walk(found: dict[int, tuple[int, int | None]], end: int) -> set[int]:
        kept: set[int] = set()
        block: int | None = end
        while block is not None:
            kept.add(block)
            block = found[block][1]
        return kept

    path, start = set(), header
    for stop in (block for block in body if block in within):
        found = paths(start)
        if stop in found:
            path |= walk(found, stop)
            start = stop
    found = paths(start)
    latches = [block for block in found if header in after[block]]
    return path | walk(found, min(latches, key=lambda block: found[block][0]))


def _blocks(found: Sequence[Instruction]) -> dict[int, list[Instruction]]:
    # straight-line code by the address of its first instruction
    targets = {i.target for i in found}
    blocks: dict[int, list[Instruction]] = {}
    ended = True
    for i in found:
        if ended or i.address in targets:
            blocks[i.address] = current = []
        current.append(i)
        ended = i.stem in ("BRA", "EXIT", "RET", "BRX", "JMP")
    return blocks


def _successors(block: Sequence[Instruction], blocks: dict[int, list[Instruction]]) -> list[int]:
    last = block[-1]
    following = last.address + 16
    found = []
    if last.stem == "BRA" and last.target in blocks and not last.opcode.startswith("BRA.DIV"):
        found.append(last.target)
    # BRA.U UP0, 0x70 and BRA.DIV UR4, 0x70 hold their condition among the operands
    goes_on = last.guard or (last.stem == "BRA" and "," in last.operands)
    ends = last.stem in ("BRA", "EXIT", "RET", "BRX", "JMP")
    if (goes_on or not ends) and following in blocks:
        found.append(following)
    return found


def _dominators(
    first: int, after: dict[int, list[int]]
) -> tuple[list[int], dict[int, int]]:  # fmt: skip
    # Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm": blocks that are reached in
    # reverse postorder, and the immediate dominator of each.
    order: list[int] = []
    seen, stack = {first}, [(first, iter(after[first]))]
    while stack:
        block, rest = stack[-1]
        target = next((t for t in rest if t not in seen), None)
        if target is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(after[target])))
    order.reverse()
    place = {block: n for n, block in enumerate(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in after[block]:
            before[target].append(block)
    dominator = {first: first}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [b for b in before[block] if b in dominator]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if place[new] > place[other]:
                        new = dominator[new]
                    else:
                        other = dominator[other]
            changed |= dominator.get(block) != new
            dominator[block] = new
    return order, dominator


def _dominates(a: int, b: int, dominator: dict[int, int]) -> bool:
    while b != a and dominator[b] != b:
        b = dominator[b]
    return a == b


def _spins(body: Iterable[Instruction]) -> bool:
    found = list(body)
    return len(found) < 16 and any(i.opcode.startswith("SYNCS.PHASECHK") for i in found)


def counts(found: Sequence[Instruction]) -> Counter[str]:
    """Instructions by kind."""
    return Counter(i.kind for i in found)


def code(launch: Launch) -> Code:
    """A launch's kernel, compiled for ``TARGET`` and disassembled."""
    compiled = compile_launch(launch, TARGET)
    cubin = compiled.asm["cubin"]
    (usage,) = cuda_usage(cubin).values()
    text = cuobjdump(cubin, "--dump-sass")
    warps = launch.options["num_warps"]
    return read(launch.name, text, usage, compiled.metadata.shared, warps)


def read(name: str, text: str, usage: dict[str, int], shared: int, warps: int) -> Code:
    """A kernel from its disassembly and what :func:`launches.cuda_usage` says of it."""
    found, outside = loops(instructions(text))
    spilled = usage["STACK"] + usage["LOCAL"]
    return Code(name, found, outside, usage["REG"], spilled, shared, warps)
