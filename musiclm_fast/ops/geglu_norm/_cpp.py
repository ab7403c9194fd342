"""The C++ kernel of csrc/geglu_norm for CPU tensors in float32, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled


def supports(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    if gamma.shape[0] == 0:
        return False, "there is no hidden unit"
    return _compiled.supports(x, "cpu", (torch.float32,), gamma=gamma, beta=beta)


def run(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Call the kernel on rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    op = torch.ops.musiclm_fast.geglu_norm_forward
    out: Tensor = op(rows, gamma.contiguous(), beta.contiguous())[0]
    return out.view(*x.shape[:-1], x.shape[-1] // 2)


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty(rows, width // 2), x.new_empty(rows), x.new_empty(rows)


def _fake_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)


if _extension.load():
    _compiled.register("geglu_norm", _fake_forward, _fake_backward, results=1)
