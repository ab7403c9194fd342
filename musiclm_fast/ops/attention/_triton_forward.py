"""Launcher of the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops._triton_target import Config
from musiclm_fast.ops.attention._autograd import empty_heads
from musiclm_fast.ops.attention._triton_call import PRECISION, SMALLEST_SCALE, Call, launch, strides
from musiclm_fast.ops.attention._triton_tiles import run_tuned


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``musiclm_fast::attention_forward_triton``: the output and its rows' base-2 log-sum-exp."""
    out = empty_heads(q)
    lse2 = q.new_empty(q.shape[:3], dtype=torch.float32)
    if k.shape[2] == 0:
        return out.zero_(), lse2.fill_(-math.inf)
    if out.numel():
        call = Call(q, k, v, *options)
        run_tuned(call, "forward", lambda chosen: _run(call, out, lse2, chosen.forward))
    return out, lse2


def _run(call: Call, out: Tensor, lse2: Tensor, config: Config) -> None:
    # The kernel needs a positive scale: it takes the maximum of what it scales later, and adds the
    # bias before. Below the smallest, products do not count beside any bias.
    q, scale = call.q, call.scale
    if scale < SMALLEST_SCALE:
        q = q * (-1.0 if scale <= -SMALLEST_SCALE else 0.0)
        scale = max(-scale, SMALLEST_SCALE)
    k = call.k if call.k_scale is None else call.normalized(call.k, call.k_scale)
    table = call.bias_table
    if table is not None:
        table = table.float().contiguous() / scale
    launch(
        "forward_kernel",
        call.batch * call.heads * -(-call.queries // config.block_m),
        config.options,
        q=q, k=k, v=call.v, out=out, logsumexp2=lse2, q_scale=call.q_scale,
        table=table, **call.shared(scale),
        **strides("q", q, "bhm"), **strides("k", k, "bhn"), **strides("v", call.v, "bhn"),
        **strides("o", out, "bhm"), heads=call.heads,
        HEAD_DIM=call.head_dim, BLOCK_D=call.block_d, GROUP=call.group, CAUSAL=call.causal,
        PRECISION=PRECISION, PTX=call.ptx, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip
