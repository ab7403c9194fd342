"""Rows, fakes and autograd of a fused kernel, once for both backends.

A backend is a pair of ``torch.library`` ops on rows. The C++ library defines ``geglu_norm_forward``
and ``geglu_norm_backward`` (csrc/library.cpp has the same schemas), Triton the same names with
``_triton`` at the end. The mean and reciprocal deviation of each row are kept for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops import _compiled

FORWARD_SCHEMA = "(Tensor x, Tensor gamma, Tensor beta) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)"
)


def run(forward: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Call a forward op on rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = forward(rows, gamma.contiguous(), beta.contiguous())[0]
    return out.view(*x.shape[:-1], x.shape[-1] // 2)


def empty_results(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of the forward op."""
    rows, width = x.shape
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(rows, width // 2), mean, rstd


def _fake_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)


def register(backend: str = "") -> None:
    """Register fakes and autograd of a pair of ops that exist."""
    _compiled.register("geglu_norm", empty_results, _fake_backward, results=1, backend=backend)
