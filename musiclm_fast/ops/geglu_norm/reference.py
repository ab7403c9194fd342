"""The gated unit and the norm after it in pure torch: definition, fallback and oracle."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def geglu_norm_reference(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """See :func:`musiclm_fast.ops.geglu_norm`."""
    hidden = gamma.shape[0]
    values, gates = (half[..., :hidden] for half in x.chunk(2, dim=-1))
    out = F.layer_norm(F.gelu(gates) * values, (hidden,), gamma, beta)
    return F.pad(out, (0, x.shape[-1] // 2 - hidden))
