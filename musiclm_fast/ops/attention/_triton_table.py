"""The gradient of the bias table: sums of dS over equal offsets."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops.attention._triton_bands import Band
from musiclm_fast.ops.attention._triton_call import BLOCK, SMALL, Call, batch_stride, launch

# Bytes of the partial sums and of the index of codes.
PARTIAL_BYTES = 4 << 20
INDEX_BYTES = 2 << 20


class TableGradient:
    """Sums of dS over equal offsets, band by band, in a fixed order and without atomics."""

    block_h, block_j, edge_keys = 8, 4, 32

    def __init__(self, call: Call) -> None:
        assert call.q_codes is not None and call.k_codes is not None
        self.call = call
        self.key_blocks = -(-call.keys // self.edge_keys)
        entries = 2 * call.radius + 1
        per_sample = call.q_codes.ndim == 2
        tables = call.batch if per_sample else 1
        largest = max(INDEX_BYTES // (4 * tables), 128)
        self.slots = max(128, min(1 << (2 * call.radius).bit_length(), 1 << 14))
        self.slots = min(self.slots, 1 << (largest.bit_length() - 1))
        self.block_r = min(256, max(64, 1 << (entries - 1).bit_length()))
        self.r_blocks = -(-entries // self.block_r)
        h_blocks = -(-call.heads // self.block_h)
        wanted = min(64, -(-1024 // (self.r_blocks * h_blocks)), -(-call.batch * call.keys // 32))
        self.parts = max(1, min(wanted, PARTIAL_BYTES // (4 * call.heads * entries)))

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=call.device)

        self.first, self.following = empty(tables, self.slots), empty(tables, call.queries)
        launch(
            "index_kernel", tables * (-(-self.slots // BLOCK) + -(-call.queries // BLOCK)), SMALL,
            q_codes=call.q_codes, first=self.first, following=self.following,
            stride_qcb=batch_stride(call.q_codes), queries=call.queries, slots=self.slots,
            BLOCK=BLOCK,
        )  # fmt: skip
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=call.device)
        self.inner = zeros(self.parts, call.heads, entries)
        self.edges = zeros(call.batch, call.heads, self.key_blocks, 2)

    def add(self, band: Band, ds: Tensor, ds_rows: int, ds_keys: int) -> None:
        call = self.call
        band_heads = band.kv_heads * call.group
        common: dict[str, Any] = dict(
            ds=ds, q_codes=call.q_codes, k_codes=call.k_codes, key_mask=call.key_mask,
            key_lengths=call.key_lengths, **call.code_strides(), heads=call.heads,
            queries=call.queries, keys=call.keys, radius=call.radius, sample0=band.sample,
            head0=band.kv_head * call.group, band_heads=band_heads, row_begin=band.row_begin,
            row_end=band.row_end, ds_rows=ds_rows, ds_keys=ds_keys, CAUSAL=call.causal,
        )  # fmt: skip
        per_sample = call.q_codes is not None and call.q_codes.ndim == 2
        pairs = band.samples * call.keys
        if call.radius > 0:
            h_blocks = -(-band_heads // self.block_h)
            launch(
                "table_gradient_kernel", self.r_blocks * h_blocks * self.parts, SMALL,
                **common, first=self.first, following=self.following, partial=self.inner,
                stride_firstb=self.slots if per_sample else 0,
                stride_followingb=call.queries if per_sample else 0, slots=self.slots,
                pairs=pairs, pairs_per_part=-(-pairs // self.parts),
                BLOCK_H=self.block_h, BLOCK_J=self.block_j, BLOCK_R=self.block_r,
            )  # fmt: skip
        launch(
            "table_edges_kernel", band.samples * band_heads * self.key_blocks, SMALL,
            **common, partial=self.edges, BLOCK_M=64, BLOCK_N=self.edge_keys,
        )  # fmt: skip

    def result(self) -> Tensor:
        """``(H, 2R + 1)`` float32."""
        table = self.inner.sum(0)
        low, high = self.edges.sum((0, 2)).unbind(-1)
        table[:, 0] += low
        table[:, -1] += high
        return table
