"""Workspace of the gradient of the bias table, and the launch that fills it."""

from __future__ import annotations

from typing import Any

import torch

from musiclm_fast.ops._triton_target import Config
from musiclm_fast.ops.attention._triton_call import Call
from musiclm_fast.ops.attention._triton_plan import Plan

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

# Of the workspace, what only a call with a table has.
NAMES = (
    "scaled_table", "padded_codes", "ranks", "scratch", "partial", "inverse", "frame", "listed",
    "used", "clash",
)  # fmt: skip


def add_workspace(plan: Plan, call: Call, config: Config, length: int) -> dict[str, Any]:
    """Ask for the workspace of a call.

    ``scaled_table`` is the table over the scale, ``padded_codes`` are the queries' codes in rows of
    ``length``, ``ranks`` those among equal codes, ``partial`` (parts, H, 2R + 1) is zeros,
    ``scratch`` the programs' own. The index of codes that samples do
    not share: ``inverse``, ``frame``, ``listed``, and zeros, ``used`` and ``clash``.

    Returns:
        Numbers of the kernels: ``parts``, programs of the table's kernel for each head; ``chunks``,
        pieces into which the batch is cut where there are few tiles; ``slots``, places of codes in
        the index, a power of two, 0 for codes shared by the batch; ``rank_rows``, rows of ranks.
    """
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
        plan.workspace("inverse", 2, call.batch, slots, dtype=torch.int32)
        plan.workspace("frame", 2, slots, dtype=torch.int32)
        plan.workspace("listed", 2, slots, dtype=torch.int32)
        plan.zeros("used", 2, slots, dtype=torch.int32)
        plan.zeros("clash", 1, dtype=torch.int32)
    plan.zeros("partial", parts, call.heads, entries)
    plan.workspace("scaled_table", call.heads, entries)
    plan.workspace("scratch", parts, call.heads, SCRATCH)
    plan.workspace("ranks", *call.q_codes.shape, dtype=torch.int32)
    plan.workspace("padded_codes", *call.q_codes.shape[:-1], length, dtype=torch.int32)
    return dict(
        parts=parts, chunks=chunks, slots=slots,
        rank_rows=call.q_codes.numel() // call.queries,
        stride_ranksb=call.queries if call.q_codes.ndim == 2 else 0,
    )  # fmt: skip
