"""Launcher of the backward pass: at most six launches, whatever the shapes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import fail
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops.attention import _triton_table
from musiclm_fast.ops.attention._autograd import empty_heads
from musiclm_fast.ops.attention._triton_call import (
    BLOCK,
    PRECISION,
    SMALL,
    SMALLEST_SCALE,
    Call,
    batch_stride,
    launch,
    round_up,
    rows,
    strides,
)
from musiclm_fast.ops.attention._triton_tiles import (
    Configs,
    recomputed_q_config,
    run_tuned,
    table_config,
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# Columns of a program that sums the gradients of a scale, and of one that sums tables.
SCALE_COLUMNS, TABLE_COLUMNS = 8, 256
# Rows of dS are padded to whole tiles of every kernel that touches it.
DS_ROWS = 128
# Bytes of dS up to which it is kept; a longer one is computed again by each kernel that needs it.
_MEBIBYTES = os.environ.get("MUSICLM_FAST_ATTENTION_WORKSPACE") or "1280"
if not _MEBIBYTES.isdecimal():
    fail("MUSICLM_FAST_ATTENTION_WORKSPACE", repr(_MEBIBYTES), "a whole number of MiB, 0 or more")
DS_BYTES = int(_MEBIBYTES) << 20


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *options: Any
) -> Gradients:
    """``musiclm_fast::attention_backward_triton``: gradients of q, k, v, table and scales."""
    call = Call(q, k, v, *options)

    def empty(x: Tensor | None) -> Tensor:
        if x is None:
            return q.new_empty(0)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    grads = (
        empty_heads(q), empty_heads(k), empty_heads(v),
        empty(call.bias_table), empty(call.q_scale), empty(call.k_scale),
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


def _stores_ds(call: Call, elements: int) -> bool:
    # Where few entries of a table collect many pairs, the error of a delta from the rounded output
    # adds up, and only the other way corrects it.
    few = call.bias_table is not None and 2 * call.radius + 1 < max(call.queries, call.keys)
    return not few and elements * call.dtype.itemsize <= DS_BYTES


def _run(
    call: Call, grad_out: Tensor, out: Tensor, lse2: Tensor, grads: Gradients, chosen: Configs
) -> None:
    grad_q, grad_k, grad_v, grad_table, grad_q_scale, grad_k_scale = grads
    batch, heads, kv_heads = call.batch, call.heads, call.kv_heads
    queries, keys, head_dim = call.queries, call.keys, call.head_dim
    target = _triton_target.target(call.device)
    kv, dq = chosen.backward_kv, chosen.backward_q
    key_blocks = -(-keys // kv.block_n)
    entries = 2 * call.radius + 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=call.device)

    ds = None
    absent = round_up(queries, DS_ROWS)  # the place of a query that a sample lacks
    ds_rows, ds_keys = absent + 16, key_blocks * kv.block_n
    if _stores_ds(call, batch * heads * ds_rows * ds_keys):
        ds = empty(batch * heads * ds_keys + 1, ds_rows, dtype=call.dtype)
    else:
        dq = recomputed_q_config(chosen, target, head_dim, call.dtype)
    query_blocks = -(-queries // dq.block_m)
    # The table is divided by it. Below the smallest, products do not count beside any bias.
    scale = call.scale if abs(call.scale) >= SMALLEST_SCALE else SMALLEST_SCALE
    q, k = call.q, call.k
    q_parts = k_parts = table = scaled_table = padded_codes = work = None
    index = _triton_table.NO_INDEX
    ranks, rank_rows, slots = None, 0, 0
    delta, padded_lse2 = empty(2, batch, heads, absent)
    programs = batch * heads * -(-absent // BLOCK)
    if call.q_scale is not None and call.k_scale is not None:
        q, k = empty(*q.shape, dtype=q.dtype), empty(*k.shape, dtype=k.dtype)
        q_parts = empty(batch * heads * query_blocks, head_dim)
        k_parts = empty(batch * kv_heads * key_blocks, head_dim)
        programs += batch * kv_heads * -(-keys // BLOCK)
    if call.bias_table is not None:
        table = call.bias_table.contiguous()
        scaled_table = empty(heads, entries)
        tile = table_config(ds is not None, target, head_dim, call.dtype)
        work = _triton_table.plan(call, tile)
        index, slots = work.index, work.slots
        ranks, rank_rows = work.ranks, work.ranks.numel() // queries
        padded_codes = empty(*ranks.shape[:-1], absent, dtype=torch.int32)
        programs += -(-heads * entries // (BLOCK * call.block_d))
        programs += rank_rows * -(-queries // (2 * BLOCK)) + (2 * batch if slots else 0)
    launch(
        "prepare_kernel", programs, SMALL,
        q=call.q, k=call.k, grad_out=grad_out, out=out, logsumexp2=lse2,
        q_scale=call.q_scale, k_scale=call.k_scale,
        table=table, q_codes=call.q_codes, k_codes=call.k_codes, q_normal=q, k_normal=k,
        delta=delta, lse2=padded_lse2, scaled_table=scaled_table, scale=scale,
        inverse=index["inverse"], frame=index["frame"], used=index["used"], clash=index["clash"],
        **strides("q", call.q, "bhm"),
        **strides("k", call.k, "bhn"), **strides("g", grad_out, "bhm"), **strides("o", out, "bhm"),
        stride_qcb=batch_stride(call.q_codes), stride_kcb=batch_stride(call.k_codes),
        batch=batch, heads=heads, kv_heads=kv_heads, queries=queries,
        keys=keys, entries=entries, slots=slots, absent=absent,
        padded_codes=padded_codes, ranks=ranks, rank_rows=rank_rows,
        RANK_GROUP=_triton_table.RANK_GROUP,
        HEAD_DIM=head_dim, BLOCK_D=call.block_d, BLOCK=BLOCK,
    )  # fmt: skip
    common: dict[str, Any] = dict(
        grad_out=grad_out, q=q, k=k, v=call.v, lse2=padded_lse2, delta=delta, slots=slots,
        scaled_table=scaled_table, absent=absent, **call.shared(scale),
        **strides("g", grad_out, "bhm"),
        **strides("q", q, "bhm"), **strides("k", k, "bhn"), **strides("v", call.v, "bhn"),
        heads=heads, HEAD_DIM=head_dim, BLOCK_D=call.block_d, GROUP=call.group,
        CAUSAL=call.causal, PRECISION=PRECISION, PTX=call.ptx,
    )  # fmt: skip
    common |= dict(q_codes=padded_codes, stride_qcb=batch_stride(padded_codes))
    frame = dict(frame=index["frame"], clash=index["clash"])
    if ds is None:  # first, because it corrects delta
        launch(
            "backward_q_kernel", batch * heads * query_blocks, dq.options,
            **common, **frame, raw_q=call.q, q_scale=call.q_scale, grad_q=grad_q,
            grad_q_scale=q_parts, **strides("r", call.q, "bhm"), scale=call.scale,
            BLOCK_M=dq.block_m, BLOCK_N=dq.block_n,
        )  # fmt: skip
    launch(
        "backward_kv_kernel", batch * kv_heads * key_blocks, kv.options,
        **common, **frame, ds=ds, ds_rows=ds_rows, raw_k=call.k, k_scale=call.k_scale,
        grad_k=grad_k, grad_v=grad_v, grad_k_scale=k_parts, **strides("r", call.k, "bhn"),
        scale=call.scale,
        MASK_KEYS=(
            call.key_mask is not None or call.key_lengths is not None or keys % kv.block_n != 0
        ),
        BLOCK_M=kv.block_m, BLOCK_N=kv.block_n,
    )  # fmt: skip
    if ds is not None:
        launch(
            "stored_q_kernel", batch * heads * query_blocks, dq.options,
            ds=ds, k=k, raw_q=call.q, q_scale=call.q_scale, key_lengths=call.key_lengths,
            grad_q=grad_q, grad_q_scale=q_parts, q_codes=call.q_codes, **frame,
            **strides("k", k, "bhn"), **strides("r", call.q, "bhm"),
            stride_qcb=batch_stride(call.q_codes), heads=heads, queries=queries, keys=keys,
            slots=slots, scale=call.scale, ds_rows=ds_rows, ds_keys=ds_keys, absent=absent,
            HEAD_DIM=head_dim, BLOCK_D=call.block_d, GROUP=call.group, CAUSAL=call.causal,
            PRECISION=PRECISION, BLOCK_M=dq.block_m, BLOCK_N=dq.block_n,
        )  # fmt: skip
    sums = 0
    if work is not None:
        launch(
            "backward_table_kernel", work.programs, tile.options,
            **common, **index, ds=ds, ds_rows=ds_rows, ds_keys=ds_keys,
            ranks=work.ranks, stride_ranksb=batch_stride(work.ranks),
            scratch=work.scratch, partial=work.partial, batch=batch, chunks=work.chunks,
            MASK_ROWS=queries % tile.block_m != 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            WINDOW=_triton_table.SCRATCH // tile.block_n,
            PIECE=_triton_table.PIECE // tile.block_n,
        )  # fmt: skip
        sums += -(-heads * entries // TABLE_COLUMNS)
    if q_parts is not None:
        sums += 2 * -(-head_dim // SCALE_COLUMNS)
    launch(
        "sums_kernel", sums, SMALL,
        partial=None if work is None else work.partial, grad_table=grad_table, q_parts=q_parts,
        grad_q_scale=grad_q_scale, k_parts=k_parts, grad_k_scale=grad_k_scale,
        parts=0 if work is None else work.programs // heads, table_size=heads * entries,
        q_rows=batch * heads * query_blocks, k_rows=batch * kv_heads * key_blocks,
        HEAD_DIM=head_dim, SCALE_COLUMNS=SCALE_COLUMNS, TABLE_COLUMNS=TABLE_COLUMNS,
    )  # fmt: skip
