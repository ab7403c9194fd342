"""Launcher of the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops.attention._autograd import empty_heads
from musiclm_fast.ops.attention._triton_call import (
    BLOCK,
    SMALL,
    SMALLEST_SCALE,
    Call,
    Tensors,
    contiguous,
    readable,
    strides,
)
from musiclm_fast.ops.attention._triton_plan import Plan, run
from musiclm_fast.ops.attention._triton_tiles import Configs


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``musiclm_fast::attention_forward_triton``: the output and its rows' base-2 log-sum-exp."""
    out = empty_heads(q)
    lse2 = q.new_empty(q.shape[:3], dtype=torch.float32)
    if k.shape[2] == 0:
        return out.zero_(), lse2.fill_(-math.inf)
    if out.numel():
        *tensors, scale, causal, dropout_p = options
        # The kernel needs a positive scale: it takes the maximum of what it scales later, and adds
        # the bias before. Below the smallest, products do not count beside any bias.
        if scale < SMALLEST_SCALE:
            q = q * (-1.0 if scale <= -SMALLEST_SCALE else 0.0)
            scale = max(-scale, SMALLEST_SCALE)
        inputs = readable(q, k, v, *tensors)
        table = inputs["table"]
        if table is not None:
            inputs["table"] = table.float().contiguous() / scale
        outputs: Tensors = dict(out=out, logsumexp2=lse2)
        run("forward", _plan, inputs, outputs, scale, causal, dropout_p)
    return out, lse2


def _plan(call: Call, chosen: Configs) -> Plan:
    config, plan = chosen.forward, Plan(call.device)
    batch, heads, length, head_dim = call.q.shape
    numbers = call.numbers() | dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n)
    k_strides = call.k.stride()
    if call.k_scale is not None:
        plan.workspace("k", *call.k.shape, dtype=call.dtype)
        plan.launch(
            "normalize_kernel", batch * call.kv_heads * -(-call.keys // BLOCK), SMALL,
            numbers | dict(heads=call.kv_heads, length=call.keys, BLOCK=BLOCK)
            | strides("x", k_strides, "bhn"),
            x="raw_k", scale="k_scale", y="k",
        )  # fmt: skip
        k_strides = contiguous(call.k.shape)
    plan.launch(
        "forward_kernel", batch * heads * -(-length // config.block_m),
        config.options,
        numbers | strides("q", call.q.stride(), "bhm") | strides("k", k_strides, "bhn")
        | dict(stride_ob=length * heads * head_dim, stride_oh=head_dim, stride_om=heads * head_dim),
    )  # fmt: skip
    return plan
