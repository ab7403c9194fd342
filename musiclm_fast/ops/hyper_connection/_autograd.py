"""Shapes, fakes and autograd of a fused kernel, once for both backends.

A backend is a pair of ``torch.library`` ops on ``(N, s, dim)``, with the weights transposed. The
C++ library defines ``hyper_connection_forward`` and ``hyper_connection_backward``
(csrc/library.cpp has the same schemas), Triton the same names with ``_triton`` at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops import _compiled

_INPUTS = (
    "Tensor streams, Tensor? beta, Tensor? branch, Tensor weights, Tensor scales, Tensor offsets"
)
# The two last results are for the backward: z = <x, weights> / |x|, and 1 / |x|, negative where
# the smallest norm divides instead.
FORWARD_SCHEMA = f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_input, Tensor grad_mixed, Tensor grad_beta, {_INPUTS}, Tensor z, "
    "Tensor inverse_norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def run(
    forward: Any, streams: Tensor, beta: Tensor | None, branch: Tensor | None, weights: Tensor,
    scales: Tensor, offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call a forward op on ``(N, s, dim)``."""
    *batch, count, dim = streams.shape
    branch_input, mixed, beta_out, _, _ = forward(
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


def empty_results(streams: Tensor, kept: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """Uninitialised results of the forward op; ``kept`` are z's first sizes after the tokens."""
    tokens, count, dim = streams.shape
    return (
        streams.new_empty(tokens, dim),
        streams.new_empty(tokens, count, dim),
        streams.new_empty(tokens, count),
        streams.new_empty(tokens, *kept, count, count + 2, dtype=torch.float32),
        streams.new_empty(tokens, count, dtype=torch.float32),
    )


def empty_gradients(
    streams: Tensor, beta: Tensor | None, branch: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients, of shape ``(0,)`` where the input is absent."""
    none = (streams.new_empty(0) if t is None else torch.empty_like(t) for t in (beta, branch))
    return torch.empty_like(streams), next(none), next(none)


def _fake_backward(
    grad_input: Tensor, grad_mixed: Tensor, grad_beta: Tensor, streams: Tensor,
    beta: Tensor | None, branch: Tensor | None, *parameters: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    first = empty_gradients(streams, beta, branch)
    return (*first, *(torch.empty_like(p) for p in parameters[:3]))


def register(backend: str = "", kept: tuple[int, ...] = ()) -> None:
    """Register fakes and autograd of a pair of ops that exist."""
    _compiled.register(
        "hyper_connection", lambda streams, *_: empty_results(streams, kept), _fake_backward,
        results=3, backend=backend,
    )  # fmt: skip
