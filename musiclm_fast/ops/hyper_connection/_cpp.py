"""The C++ kernel of csrc/hyper_connection for CPU tensors in float32, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled


def supports(streams: Tensor, **others: Tensor | None) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    return _compiled.supports(streams, "cpu", (torch.float32,), **others)


def run(
    streams: Tensor, beta: Tensor | None, branch: Tensor | None, weights: Tensor, scales: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call the kernel on ``(N, s, dim)``."""
    *batch, count, dim = streams.shape
    branch_input, mixed, beta_out, _, _ = torch.ops.musiclm_fast.hyper_connection_forward(
        streams.reshape(-1, count, dim).contiguous(),
        None if beta is None else beta.reshape(-1, count).contiguous(),
        None if branch is None else branch.reshape(-1, dim).contiguous(),
        weights.t().contiguous(), scales.contiguous(), offsets.contiguous(),
    )  # fmt: skip
    return (
        branch_input.view(*batch, dim),
        mixed.view(*batch, count, dim),
        beta_out.view(*batch, count),
    )


def _fake_forward(streams: Tensor, *_: Any) -> tuple[Tensor, ...]:
    tokens, count, dim = streams.shape
    return (
        streams.new_empty(tokens, dim),
        streams.new_empty(tokens, count, dim),
        streams.new_empty(tokens, count),
        streams.new_empty(tokens, count, count + 2),
        streams.new_empty(tokens, count),
    )


def _fake_backward(
    grad_input: Tensor, grad_mixed: Tensor, grad_beta: Tensor, streams: Tensor,
    beta: Tensor | None, branch: Tensor | None, *parameters: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    none = streams.new_empty(0)
    return (
        torch.empty_like(streams),
        none if beta is None else torch.empty_like(beta),
        streams.new_empty(0) if branch is None else torch.empty_like(branch),
        *(torch.empty_like(p) for p in parameters[:3]),
    )


if _extension.load():
    _compiled.register("hyper_connection", _fake_forward, _fake_backward, results=3)
