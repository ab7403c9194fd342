"""Token ids of several quantizers: embeddings, logits and checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._checks import fail


def quantizer_embedding(table: Tensor, length: int) -> Tensor:
    """Rows of ``table`` ``(q, dim)`` repeated in order to ``(length, dim)``."""
    rounds = -(-length // table.shape[0])
    return table.repeat(rounds, 1)[:length]


def per_quantizer_logits(weights: Tensor, hidden: Tensor) -> Tensor:
    """Logits of interleaved quantizers.

    Args:
        weights: ``(q, codes, dim)``.
        hidden: ``(B, n, dim)``. Token i belongs to quantizer i mod q; n may be any length.

    Returns:
        ``(B, n, codes)``.
    """
    quantizers, length = weights.shape[0], hidden.shape[1]
    hidden = F.pad(hidden, (0, 0, 0, -length % quantizers))
    grouped = hidden.unflatten(1, (-1, quantizers))  # (B, steps, q, dim)
    logits = torch.einsum("qcd,bnqd->bnqc", weights, grouped)
    return logits.flatten(1, 2)[:, :length]


def check_ids(name: str, ids: Tensor, allowed: Sequence[int]) -> None:
    """``ids`` is an integer tensor of one of the ``allowed`` numbers of dimensions."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim not in allowed:
        got = ids if not isinstance(ids, Tensor) else f"{ids.dtype} of shape {tuple(ids.shape)}"
        fail(name, got, f"token ids of {' or '.join(map(str, allowed))} dimensions", TypeError)
