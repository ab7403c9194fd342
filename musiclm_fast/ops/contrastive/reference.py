"""Contrastive losses in pure torch: the definition, the fallback and the oracle of the kernels.

The ``block_`` functions define what the kernels compute: a block of m rows of audio by n columns of
text in which row i's positive is column i + offset. They hold m x n numbers; the kernels do not.
"""

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
    sims = audio.to(compute) @ text.to(compute).transpose(1, 2)  # (L, B, B)
    sims = sims * temperature.to(compute)[:, None, None]
    if bias is not None:
        sims = sims + bias.to(compute)[:, None, None]
    return loss_of_similarities(sims, kind)


def loss_of_similarities(sims: Tensor, kind: str) -> Tensor:
    """The loss of similarities ``(L, B, B)``, temperature and bias included."""
    batch = sims.shape[1]
    same = torch.eye(batch, dtype=torch.bool, device=sims.device)
    if kind == "sigmoid":
        signs = torch.where(same, 1.0, -1.0).to(sims.dtype)
        return -F.logsigmoid(signs * sims).sum() / batch
    positive = sims.diagonal(dim1=1, dim2=2)  # (L, B)
    sims = sims.masked_fill(same, -torch.inf)
    row_lse, column_lse = sims.logsumexp(dim=2), sims.logsumexp(dim=1)
    if kind == "decoupled":
        return (0.5 * (row_lse + column_lse) - positive).mean(dim=1).sum()
    # ln(e^lse + e^s_ii) - s_ii, without the rounding of a difference of large numbers
    spread = _softplus(row_lse - positive) + _softplus(column_lse - positive)
    return 0.5 * spread.mean(dim=1).sum()


@without_autocast
def block_logsumexp(
    audio: Tensor, text: Tensor, temperature: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of a block's rows and columns without the positives, and the positives.

    With ``s[l, i, j] = temperature[l] * <audio[l, i], text[l, j]>``::

        row_lse[l, i]    = ln sum_{j != i + offset} e^s_ij      (-inf over no column)
        column_lse[l, j] = ln sum_{i != j - offset} e^s_ij
        positive[l, i]   = s[l, i, i + offset], 0 where the block has no such column

    Args:
        audio: ``(L, m, d)``.
        text: ``(L, n, d)``.
        temperature: ``(L,)``.
        offset: column of row 0's positive; may lie outside the block.

    Returns:
        ``(L, m)``, ``(L, n)`` and ``(L, m)`` in float32 (float64 for float64 latents).
    """
    sims, same = _similarities(audio, text, temperature, offset)
    positive = sims.masked_fill(~same, 0.0).sum(dim=2)
    sims = sims.masked_fill(same, -torch.inf)
    return sims.logsumexp(dim=2), sims.logsumexp(dim=1), positive


@without_autocast
def block_logsumexp_backward(
    grad_row: Tensor,
    grad_column: Tensor,
    grad_positive: Tensor,
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of audio, text and temperature for :func:`block_logsumexp`.

    ``row_lse`` and ``column_lse`` may run over more than this block: a block's gradients are then
    its share of the whole's::

        ds_ij = grad_row_i e^(s_ij - row_lse_i) + grad_column_j e^(s_ij - column_lse_j)
        ds_ij = grad_positive_i     where j = i + offset

    Returns:
        ``(L, m, d)``, ``(L, n, d)`` and ``(L,)`` in float32 (float64 for float64 latents).
    """
    sims, same = _similarities(audio, text, temperature, offset)
    ds = grad_row[:, :, None] * (sims - row_lse[:, :, None]).exp()
    ds = ds + grad_column[:, None, :] * (sims - column_lse[:, None, :]).exp()
    ds = torch.where(same, grad_positive[:, :, None], ds)
    return _push(ds, audio, text, temperature)


@without_autocast
def block_sigmoid(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    offset: int,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of ``softplus(-y s)`` over a block, ``s`` with the bias, y = 1 for positives, else -1.

    Returns:
        The sum, a scalar; with ``gradients`` also those of audio ``(L, m, d)``, text
        ``(L, n, d)``, temperature ``(L,)`` and bias ``(L,)``, else tensors of shape ``(0,)``.
        Float32 (float64 for float64 latents).
    """
    sims, same = _similarities(audio, text, temperature, offset)
    if bias is not None:
        sims = sims + bias.to(sims.dtype)[:, None, None]
    signed = torch.where(same, -sims, sims)
    loss = -F.logsigmoid(-signed).sum()
    if not gradients:
        return loss, sims.new_empty(0), sims.new_empty(0), sims.new_empty(0), sims.new_empty(0)
    ds = torch.where(same, -signed.sigmoid(), signed.sigmoid())
    return loss, *_push(ds, audio, text, temperature), ds.sum(dim=(1, 2))


def _similarities(
    audio: Tensor, text: Tensor, temperature: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if audio.dtype == torch.float64 else torch.float32
    sims = audio.to(compute) @ text.to(compute).transpose(1, 2)
    sims = sims * temperature.to(compute)[:, None, None]
    rows = torch.arange(audio.shape[1], device=audio.device)
    columns = torch.arange(text.shape[1], device=audio.device)
    return sims, rows[:, None] + offset == columns[None, :]


def _push(
    ds: Tensor, audio: Tensor, text: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    audio, text, temperature = (t.to(ds.dtype) for t in (audio, text, temperature))
    scale = temperature[:, None, None]
    d_audio = ds @ text  # (L, m, d), before the temperature
    d_temperature = (audio * d_audio).sum(dim=(1, 2))
    return d_audio * scale, ds.transpose(1, 2) @ audio * scale, d_temperature


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=50.0)  # torch's default of 20 errs by 2e-9
