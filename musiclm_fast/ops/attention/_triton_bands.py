"""How the backward pass is cut into bands, so that dS and its partial sums stay small."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of dS that exist at a time.
DS_BYTES = 40 << 20
# Programs that a band of the backward should have: two for each of an H100's multiprocessors.
BAND_PROGRAMS = 256
# Rows of dS are padded to whole tiles of every kernel that touches it.
DS_ROWS = 128


@dataclass(frozen=True)
class Band:
    """What one round of the backward's kernels works on."""

    sample: int
    samples: int
    kv_head: int
    kv_heads: int
    row_begin: int
    row_end: int


def plan_bands(
    batch: int, kv_heads: int, group: int, queries: int, keys: int, block_n: int, itemsize: int
) -> list[Band]:
    """Cut the backward into bands whose dS fits into ``DS_BYTES``, in a fixed order.

    A band holds whole (sample, key head) pairs if that leaves enough programs for a device.
    Otherwise it holds some rows of more pairs, and sums over the rows carry over to the next band.
    """
    blocks = -(-keys // block_n)
    row_bytes = group * blocks * block_n * itemsize  # of one query row of one pair
    padded = round_up(queries, DS_ROWS)
    pairs = batch * kv_heads
    units = DS_BYTES // (row_bytes * padded)
    rows = queries
    if units < pairs and units * blocks < BAND_PROGRAMS:
        units = min(pairs, BAND_PROGRAMS // blocks, DS_BYTES // (row_bytes * DS_ROWS))
        units = max(units, 1)
        rows = max(DS_BYTES // (row_bytes * units) // DS_ROWS * DS_ROWS, DS_ROWS)
        rows = round_up(_even(queries, rows), DS_ROWS)
    units = min(units, pairs)
    samples = _even(batch, max(units // kv_heads, 1))
    heads = _even(kv_heads, min(units, kv_heads))
    return [
        Band(b, min(samples, batch - b), h, min(heads, kv_heads - h), i, min(i + rows, queries))
        for b in range(0, batch, samples)
        for h in range(0, kv_heads, heads)
        for i in range(0, queries, rows)
    ]


def round_up(value: int, multiple: int) -> int:
    """The next multiple, or the value if it is one."""
    return -(-value // multiple) * multiple


def _even(total: int, largest: int) -> int:
    # Size of the pieces when total is cut into as few pieces of at most `largest` as possible.
    return -(-total // -(-total // min(largest, total)))
