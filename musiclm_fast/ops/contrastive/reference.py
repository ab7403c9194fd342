"""Contrastive losses in pure torch: the definition, the fallback and the oracle of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._dispatch import without_autocast


@without_autocast
def contrastive_loss_reference(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "softmax",
) -> Tensor:
    """Same arguments and result as :func:`musiclm_fast.ops.contrastive_loss`, with B x B memory."""
    compute = torch.float64 if audio.dtype == torch.float64 else torch.float32
    _layers, batch, _ = audio.shape
    sims = audio.to(compute) @ text.to(compute).transpose(1, 2)  # (L, B, B)
    sims = sims * temperature.to(compute)[:, None, None]
    if bias is not None:
        sims = sims + bias.to(compute)[:, None, None]
    same = torch.eye(batch, dtype=torch.bool, device=audio.device)
    if kind == "sigmoid":
        signs = torch.where(same, 1.0, -1.0).to(compute)
        return -F.logsigmoid(signs * sims).sum() / batch
    positive = sims.diagonal(dim1=1, dim2=2)  # (L, B)
    if kind == "decoupled":
        sims = sims.masked_fill(same, -torch.inf)
    spread = 0.5 * (sims.logsumexp(dim=2) + sims.logsumexp(dim=1))
    return (spread - positive).mean(dim=1).sum()
