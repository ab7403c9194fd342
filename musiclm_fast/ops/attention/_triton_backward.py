"""Launcher of the backward pass, band by band."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops.attention._autograd import empty_heads
from musiclm_fast.ops.attention._triton_bands import DS_ROWS, plan_bands, round_up
from musiclm_fast.ops.attention._triton_call import (
    BLOCK,
    PRECISION,
    SMALL,
    Call,
    launch,
    rows,
    strides,
)
from musiclm_fast.ops.attention._triton_table import TableGradient
from musiclm_fast.ops.attention._triton_tiles import Configs, run_tuned

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *options: Any
) -> Gradients:
    """``musiclm_fast::attention_backward_triton``: gradients of q, k, v, table and scales."""
    call = Call(q, k, v, *options)

    def zeros(x: Tensor | None) -> Tensor:
        if x is None:
            return q.new_empty(0)
        return torch.zeros_like(x, memory_format=torch.contiguous_format)

    grads = (
        empty_heads(q), empty_heads(k), empty_heads(v),
        zeros(call.bias_table), zeros(call.q_scale), zeros(call.k_scale),
    )  # fmt: skip
    if q.numel() and k.numel():
        grad_out, out = rows(grad_out), rows(out)
        run_tuned(
            call, "backward", lambda chosen: _run(call, grad_out, out, logsumexp, grads, chosen)
        )
    else:
        for grad in grads:
            grad.zero_()
    return grads


def _run(
    call: Call, grad_out: Tensor, out: Tensor, lse2: Tensor, grads: Gradients, chosen: Configs
) -> None:
    grad_q, grad_k, grad_v, grad_table, grad_q_scale, grad_k_scale = grads
    batch, heads, kv_heads = call.batch, call.heads, call.kv_heads
    queries, keys, head_dim = call.queries, call.keys, call.head_dim
    kv, dq = chosen.backward_kv, chosen.backward_q
    key_blocks = -(-keys // kv.block_n)
    query_blocks = -(-queries // dq.block_m)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.device)

    delta = empty(batch, heads, queries)
    launch(
        "delta_kernel", batch * heads * -(-queries // BLOCK), SMALL,
        grad_out=grad_out, out=out, delta=delta, **strides("g", grad_out, "bhm"),
        **strides("o", out, "bhm"), heads=heads, queries=queries,
        HEAD_DIM=head_dim, BLOCK_D=call.block_d, BLOCK=BLOCK,
    )  # fmt: skip
    q, k = call.q, call.k
    q_scale_parts = k_scale_parts = None
    if call.q_scale is not None and call.k_scale is not None:
        q, k = call.normalized(q, call.q_scale), call.normalized(k, call.k_scale)
        q_scale_parts = empty(batch * heads * query_blocks, head_dim)
        k_scale_parts = empty(batch * kv_heads * key_blocks, head_dim)
    table = TableGradient(call) if call.table2 is not None else None

    bands = plan_bands(batch, kv_heads, call.group, queries, keys, kv.block_n, call.dtype.itemsize)
    largest = bands[0]  # the first band is never smaller than another
    ds_rows = round_up(largest.row_end - largest.row_begin, DS_ROWS)
    ds_keys = key_blocks * kv.block_n
    pairs = largest.samples * largest.kv_heads
    ds = empty(pairs * call.group, ds_keys, ds_rows, dtype=call.dtype)
    carry = None
    if largest.row_end < queries:
        carry = empty(2, pairs, ds_keys, call.block_d)
    for band in bands:
        units = band.samples * band.kv_heads
        where = dict(sample0=band.sample, row_begin=band.row_begin, row_end=band.row_end)
        launch(
            "backward_kv_kernel", units * key_blocks, kv.options,
            grad_out=grad_out, q=q, k=k, v=call.v, raw_k=call.k, k_scale=call.k_scale,
            logsumexp2=lse2, delta=delta, ds=ds, carry=carry, grad_k=grad_k, grad_v=grad_v,
            grad_k_scale=k_scale_parts, **call.bias(), **strides("g", grad_out, "bhm"),
            **strides("q", q, "bhm"), **strides("k", k, "bhn"), **strides("v", call.v, "bhn"),
            **strides("r", call.k, "bhn"), **strides("dk", grad_k, "bhn"),
            heads=heads, kv_heads=kv_heads, scale=call.scale, **where, kv_head0=band.kv_head,
            band_kv_heads=band.kv_heads, ds_rows=ds_rows,
            HEAD_DIM=head_dim, BLOCK_D=call.block_d, GROUP=call.group, CAUSAL=call.causal,
            MASK_KEYS=(
                call.key_mask is not None or call.key_lengths is not None
                or keys % kv.block_n != 0
            ),
            PRECISION=PRECISION, PTX=call.ptx, BLOCK_M=kv.block_m, BLOCK_N=kv.block_n,
        )  # fmt: skip
        band_blocks = -(-(band.row_end - band.row_begin) // dq.block_m)
        launch(
            "backward_q_kernel", units * call.group * band_blocks, dq.options,
            ds=ds, k=k, raw_q=call.q, q_scale=call.q_scale, key_lengths=call.key_lengths,
            grad_q=grad_q, grad_q_scale=q_scale_parts, **strides("k", k, "bhn"),
            **strides("r", call.q, "bhm"), **strides("dq", grad_q, "bhm"),
            heads=heads, queries=queries, keys=keys, scale=call.scale, **where,
            kv_head0=band.kv_head, band_kv_heads=band.kv_heads, ds_rows=ds_rows, ds_keys=ds_keys,
            query_blocks=query_blocks,
            HEAD_DIM=head_dim, BLOCK_D=call.block_d, GROUP=call.group, CAUSAL=call.causal,
            PRECISION=PRECISION, BLOCK_M=dq.block_m, BLOCK_N=dq.block_n,
        )  # fmt: skip
        if table is not None:
            table.add(band, ds, ds_rows, ds_keys)
    if table is not None:
        grad_table.copy_(table.result())
    if q_scale_parts is not None and k_scale_parts is not None:
        grad_q_scale.copy_(q_scale_parts.sum(0))
        grad_k_scale.copy_(k_scale_parts.sum(0))
