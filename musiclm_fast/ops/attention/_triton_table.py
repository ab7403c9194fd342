"""Workspace of the gradient of the bias table, and the launch that fills it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musiclm_fast.ops._triton_target import Config
from musiclm_fast.ops.attention._triton_call import Call

# Programs that a launch should have: two for each of an H100's multiprocessors.
PROGRAMS = 264
# Tasks of a program, so that the last round is a small part of all.
ROUNDS = 4
# Bytes of the programs' own tables, and of the positions of codes.
PARTIAL_BYTES = 16 << 20
INDEX_BYTES = 64 << 20
# A program's scratch, in numbers, and those that are read at a time.
SCRATCH, PIECE = 1 << 14, 1 << 11
# Queries among which equal codes are told apart, at least a tile.
RANK_GROUP = 512

NO_INDEX: dict[str, Tensor | None] = dict.fromkeys(("inverse", "frame", "used", "listed", "clash"))


@dataclass(frozen=True)
class TableWork:
    """What the kernels of a table's gradient write.

    Args:
        programs: of the table's kernel: ``parts`` for each head.
        chunks: pieces into which the batch is cut, where there are few tiles.
        slots: places of codes in the index, a power of two; 0 for codes shared by the batch.
        partial: ``(parts, H, 2R + 1)``, zeros.
        scratch: of the programs.
        ranks: of queries among equal codes, shaped as their codes.
        index: ``inverse``, ``frame``, ``used``, ``listed`` and ``clash`` of the kernels, None for
            codes shared by the batch.
    """

    programs: int
    chunks: int
    slots: int
    partial: Tensor
    scratch: Tensor
    ranks: Tensor
    index: dict[str, Tensor | None]


def plan(call: Call, config: Config) -> TableWork:
    """The workspace of a call, by its shapes alone."""
    assert call.q_codes is not None and call.k_codes is not None
    entries = 2 * call.radius + 1
    tiles = -(-call.queries // config.block_m) * -(-call.keys // config.block_n)
    wanted = -(-PROGRAMS // call.heads)
    chunks = max(1, min(call.batch, ROUNDS * wanted // tiles))
    parts = max(1, min(wanted, tiles * chunks, PARTIAL_BYTES // (4 * call.heads * entries)))
    slots = 0
    if call.q_codes.ndim == 2 or call.k_codes.ndim == 2:
        slots = 1 << (entries - 1).bit_length()
        most = max(INDEX_BYTES // (8 * call.batch), 128)
        slots = max(128, min(slots, 1 << 14, 1 << (most.bit_length() - 1)))
    programs = parts * call.heads
    # One tensor of zeros: the partial tables, the used slots and the clash.
    zeros = torch.zeros(programs * entries + 2 * slots + 1, dtype=torch.float32, device=call.device)
    partial, flags = zeros.split((programs * entries, 2 * slots + 1))
    index = NO_INDEX
    if slots:
        flags = flags.view(torch.int32)
        places = torch.empty(
            2 * call.batch * slots + 4 * slots, dtype=torch.int32, device=call.device
        )
        inverse, frame, listed = places.split((2 * call.batch * slots, 2 * slots, 2 * slots))
        index = dict(
            inverse=inverse, frame=frame, listed=listed, used=flags[: 2 * slots],
            clash=flags[2 * slots :],
        )  # fmt: skip
    scratch = torch.empty(programs * SCRATCH, dtype=torch.float32, device=call.device)
    ranks = torch.empty(call.q_codes.shape, dtype=torch.int32, device=call.device)
    return TableWork(programs, chunks, slots, partial, scratch, ranks, index)
