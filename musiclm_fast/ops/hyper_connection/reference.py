"""The mixing of residual streams in pure torch: definition, fallback and oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def hyper_connection_reference(
    streams: Tensor,
    beta: Tensor | None,
    branch: Tensor | None,
    weights: Tensor,
    scales: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`musiclm_fast.ops.hyper_connection`."""
    if beta is not None and branch is not None:
        streams = torch.addcmul(streams, beta[..., None], branch[..., None, :])
    norm = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_min(1e-12)
    mix = torch.addcmul(offsets, torch.tanh(streams @ weights / norm), scales)  # (..., s, s + 2)
    alpha = mix[..., :-1].transpose(-1, -2)
    # Two products: the branch may keep its input without keeping the mixed streams alive.
    branch_input = (alpha[..., :1, :] @ streams).squeeze(-2)
    return branch_input, alpha[..., 1:, :] @ streams, mix[..., -1]
