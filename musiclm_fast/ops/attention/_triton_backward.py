"""Launcher of the backward pass: at most six launches, whatever the shapes."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from musiclm_fast._checks import fail
from musiclm_fast.ops import _triton_target
from musiclm_fast.ops.attention import _triton_table
from musiclm_fast.ops.attention._autograd import empty_heads
from musiclm_fast.ops.attention._triton_call import (
    BLOCK,
    SMALL,
    Call,
    Tensors,
    contiguous,
    readable,
    round_up,
    rows,
    strides,
)
from musiclm_fast.ops.attention._triton_plan import Plan, run
from musiclm_fast.ops.attention._triton_tiles import Configs, recomputed_q_config, table_config

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
# The backward's workspace; parts of it exist for some calls only.
NAMES = ("delta", "ds", "q_parts", "k_parts", *_triton_table.NAMES)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, *options: Any
) -> Gradients:
    """``musiclm_fast::attention_backward_triton``: gradients of q, k, v, table and scales."""
    *tensors, scale, causal, dropout_p = options
    inputs = readable(q, k, v, *tensors)

    def empty(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    table = inputs["table"]
    grads = (
        empty_heads(q), empty_heads(k), empty_heads(v),
        empty(table), empty(inputs["q_scale"]), empty(inputs["k_scale"]),
    )  # fmt: skip
    if q.numel() and k.numel():
        inputs.update(
            table=None if table is None else table.contiguous(), grad_out=rows(grad_out),
            out=rows(out),
        )  # fmt: skip
        outputs: Tensors = dict(
            logsumexp2=logsumexp, grad_q=grads[0], grad_k=grads[1], grad_v=grads[2],
            grad_table=grads[3], grad_q_scale=grads[4], grad_k_scale=grads[5],
        )  # fmt: skip
        run("backward", _plan, inputs, outputs, scale, causal, dropout_p)
    else:
        for grad in grads:
            grad.zero_()
    return grads


def _stores_ds(call: Call, elements: int) -> bool:
    # Where few entries of a table collect many pairs, the error of a delta from the rounded output
    # adds up, and only the other way corrects it.
    few = call.table is not None and 2 * call.radius + 1 < max(call.queries, call.keys)
    return not few and elements * call.dtype.itemsize <= DS_BYTES


def _plan(call: Call, chosen: Configs) -> Plan:
    plan = Plan(call.device, NAMES)
    batch, heads, kv_heads = call.batch, call.heads, call.kv_heads
    queries, keys, head_dim = call.queries, call.keys, call.head_dim
    target = _triton_target.target(call.device)
    kv, dq = chosen.backward_kv, chosen.backward_q
    key_blocks = -(-keys // kv.block_n)
    entries = 2 * call.radius + 1
    absent = round_up(queries, DS_ROWS)  # the place of a query that a sample lacks
    ds_rows, ds_keys = absent + 16, key_blocks * kv.block_n
    stored = _stores_ds(call, batch * heads * ds_rows * ds_keys)
    if stored:
        plan.workspace("ds", batch * heads * ds_keys + 1, ds_rows, dtype=call.dtype)
    else:
        dq = recomputed_q_config(chosen, target, head_dim, call.dtype)
    query_blocks = -(-queries // dq.block_m)
    grad_out, out = call.tensors["grad_out"], call.tensors["out"]
    assert grad_out is not None and out is not None
    numbers = call.numbers() | dict(
        batch=batch, kv_heads=kv_heads, entries=entries, absent=absent, ds_rows=ds_rows,
        ds_keys=ds_keys, slots=0, rank_rows=0, parts=0, scale=call.scale,
        **strides("q", call.q.stride(), "bhm"), **strides("k", call.k.stride(), "bhn"),
        **strides("g", grad_out.stride(), "bhm"), **strides("o", out.stride(), "bhm"),
        table_size=heads * entries, q_rows=batch * heads * query_blocks,
        k_rows=batch * kv_heads * key_blocks, SCALE_COLUMNS=SCALE_COLUMNS,
        TABLE_COLUMNS=TABLE_COLUMNS, RANK_GROUP=_triton_table.RANK_GROUP, BLOCK=BLOCK,
    )  # fmt: skip
    plan.workspace("delta", batch, heads, absent)
    plan.workspace("lse2", batch, heads, absent)
    programs, sums = batch * heads * -(-absent // BLOCK), 0
    if call.q_scale is not None and call.k_scale is not None:
        plan.workspace("q", *call.q.shape, dtype=call.dtype)
        plan.workspace("k", *call.k.shape, dtype=call.dtype)
        plan.workspace("q_parts", batch * heads * query_blocks, head_dim)
        plan.workspace("k_parts", batch * kv_heads * key_blocks, head_dim)
        programs += batch * kv_heads * -(-keys // BLOCK)
        sums += 2 * -(-head_dim // SCALE_COLUMNS)
    if call.table is not None:
        tile = table_config(stored, target, head_dim, call.dtype)
        numbers |= _triton_table.add_workspace(plan, call, tile, absent)
        programs += -(-heads * entries // (BLOCK * call.block_d))
        programs += numbers["rank_rows"] * -(-queries // (2 * BLOCK))
        programs += 2 * batch if numbers["slots"] else 0
        sums += -(-heads * entries // TABLE_COLUMNS)
    plan.launch(
        "prepare_kernel", programs, SMALL, numbers | dict(scale=call.divisor),
        q="raw_q", k="raw_k", q_normal="q", k_normal="k",
    )  # fmt: skip
    if call.q_scale is not None and call.k_scale is not None:
        numbers |= strides("q", contiguous(call.q.shape), "bhm")
        numbers |= strides("k", contiguous(call.k.shape), "bhn")
    q_numbers = numbers | strides("r", call.q.stride(), "bhm")
    q_numbers |= dict(BLOCK_M=dq.block_m, BLOCK_N=dq.block_n)
    stride_qcb = absent if call.q_codes is not None and call.q_codes.ndim == 2 else 0
    padded = numbers | dict(stride_qcb=stride_qcb)
    q_programs = batch * heads * query_blocks
    if not stored:  # first, because it corrects delta
        plan.launch(
            "backward_q_kernel", q_programs, dq.options, q_numbers | dict(stride_qcb=stride_qcb),
            grad_q_scale="q_parts", q_codes="padded_codes",
        )  # fmt: skip
    mask_keys = call.key_mask is not None or call.key_lengths is not None or keys % kv.block_n != 0
    plan.launch(
        "backward_kv_kernel", batch * kv_heads * key_blocks, kv.options,
        padded | strides("r", call.k.stride(), "bhn")
        | dict(MASK_KEYS=mask_keys, BLOCK_M=kv.block_m, BLOCK_N=kv.block_n),
        grad_k_scale="k_parts", q_codes="padded_codes",
    )  # fmt: skip
    if stored:
        plan.launch("stored_q_kernel", q_programs, dq.options, q_numbers, grad_q_scale="q_parts")
    if call.table is not None:
        plan.launch(
            "backward_table_kernel", numbers["parts"] * heads, tile.options,
            padded | dict(
                MASK_ROWS=queries % tile.block_m != 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                WINDOW=_triton_table.SCRATCH // tile.block_n,
                PIECE=_triton_table.PIECE // tile.block_n,
            ),
            q_codes="padded_codes",
        )  # fmt: skip
    plan.launch("sums_kernel", sums, SMALL, numbers)
    return plan
