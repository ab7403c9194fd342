"""The cost model: what it counts in machine code, its arithmetic, and the predictions on file."""

from __future__ import annotations

import pytest

from benchmarks import sass

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
    found, outside = sass.loops(sass.instructions(LISTING))
    assert [(loop.begin, loop.end, loop.depth) for loop in found] == [(0x10, 0x80, 0),
                                                                     (0x30, 0x50, 1)]  # fmt: skip
    outer, inner = found
    assert sass.counts(inner.own) == {"float": 1, "tensor": 1, "control": 1}
    assert sass.counts(outer.own) == {"global": 1, "mufu": 1, "integer": 1, "control": 2}
    assert inner.products and not outer.products
    assert [i.opcode for i in outside] == ["MOV", "STG.E.128", "EXIT"]


@pytest.mark.parametrize(
    "registers, shared, warps, blocks",
    [(106, 41_216, 8, 2), (240, 58_112, 4, 2), (32, 0, 4, 16), (32, 131_072, 4, 1)],
)
def test_blocks_that_an_sm_holds(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert sass.Code("made up", (), (), registers, 0, shared, warps).blocks == blocks
