"""Contrastive losses in pure torch: the definition, the fallback and the oracle of the kernels.

The ``block_`` functions define what the kernels compute: a block of m rows of audio by n columns of
text in which row i's positive is column i + offset or, with labels, every column of row i's label.
They hold m x n numbers; the kernels do not.
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
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Same arguments and result as :func:`musiclm_fast.ops.contrastive_loss`, with B x B memory."""
    compute = torch.float64 if audio.dtype == torch.float64 else torch.float32
    sims = audio.to(compute) @ text.to(compute).transpose(1, 2)  # (L, B, B)
    sims = sims * temperature.to(compute)[:, None, None]
    if bias is not None and kind == "sigmoid":
        sims = sims + bias.to(compute)[:, None, None]
    loss = loss_of_similarities(sims, kind, labels)
    if bias is not None and kind != "sigmoid":  # it cancels: its gradient is zero
        loss = loss + 0.0 * bias.to(compute).sum()
    return loss


def loss_of_similarities(
    sims: Tensor, kind: str, labels: Tensor | tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The loss of similarities ``(L, B, B)``, temperature and bias included."""
    batch = sims.shape[1]
    if labels is None:
        same = torch.eye(batch, dtype=torch.bool, device=sims.device)
    else:
        of_audio, of_text = labels if isinstance(labels, tuple) else (labels, labels)
        same = of_audio[:, None] == of_text[None, :]
    if kind == "sigmoid":
        signs = torch.where(same, 1.0, -1.0).to(sims.dtype)
        return -F.logsigmoid(signs * sims).sum() / batch
    if labels is not None:
        positive = (sims * positive_weights(same, sims.dtype)).sum(dim=2)  # (L, B)
        if kind == "decoupled":
            sims = sims.masked_fill(same, -torch.inf)
        both = 0.5 * (sims.logsumexp(dim=2) + sims.logsumexp(dim=1))
        return (both - positive).mean(dim=1).sum()
    positive = sims.diagonal(dim1=1, dim2=2)  # (L, B)
    sims = sims.masked_fill(same, -torch.inf)
    row_lse, column_lse = sims.logsumexp(dim=2), sims.logsumexp(dim=1)
    if kind == "decoupled":
        return (0.5 * (row_lse + column_lse) - positive).mean(dim=1).sum()
    # ln(e^lse + e^s_ii) - s_ii, without the rounding of a difference of large numbers
    spread = _softplus(row_lse - positive) + _softplus(column_lse - positive)
    return 0.5 * spread.mean(dim=1).sum()


def positive_weights(same: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of each pair ``(B, B)`` in the mean of a row's positives, averaged with a column's.

    ``(1 / |P_i| + 1 / |P_j|) / 2`` at the positives, which ``same`` marks, and 0 elsewhere.
    """
    counts = (same.sum(dim=dim, keepdim=True).clamp(min=1) for dim in (1, 0))
    per_row, per_column = (0.5 / count.to(dtype) for count in counts)
    return same * (per_row + per_column)


@without_autocast
def block_logsumexp(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    offset: int,
    audio_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of a block's rows and columns, and the sum of each row's positives.

    With ``s[l, i, j] = temperature[l] * <audio[l, i], text[l, j]>``::

        row_lse[l, i]    = ln sum_j e^s_ij      (-inf over no column)
        column_lse[l, j] = ln sum_i e^s_ij
        positive[l, i]   = sum_j s_ij over row i's positives in the block

    The log-sum-exps leave the positives out unless ``inclusive``.

    Args:
        audio: ``(L, m, d)``.
        text: ``(L, n, d)``.
        temperature: ``(L,)``.
        offset: column of row 0's positive; may lie outside the block.
        audio_labels, text_labels: ``(m,)`` and ``(n,)`` int32, not below 0. Positives are the pairs
            with equal labels; the offset is not read.
        inclusive: whether the positives are in the log-sum-exps.

    Returns:
        ``(L, m)``, ``(L, n)`` and ``(L, m)`` in float32 (float64 for float64 latents).
    """
    sims, same = _similarities(audio, text, temperature, offset, audio_labels, text_labels)
    positive = sims.masked_fill(~same, 0.0).sum(dim=2)
    if not inclusive:
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
    audio_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of audio, text and temperature for :func:`block_logsumexp`.

    ``row_lse`` and ``column_lse`` may run over more than this block: a block's gradients are then
    its share of the whole's::

        ds_ij = grad_row_i e^(s_ij - row_lse_i) + grad_column_j e^(s_ij - column_lse_j)

    At the positives ``grad_positive_i`` takes its place or, if ``inclusive``, is added.

    Returns:
        ``(L, m, d)``, ``(L, n, d)`` and ``(L,)`` in float32 (float64 for float64 latents).
    """
    sims, same = _similarities(audio, text, temperature, offset, audio_labels, text_labels)
    ds = grad_row[:, :, None] * (sims - row_lse[:, :, None]).exp()
    ds = ds + grad_column[:, None, :] * (sims - column_lse[:, None, :]).exp()
    own = grad_positive[:, :, None]
    ds = torch.where(same, ds + own if inclusive else own, ds)
    return _push(ds, audio, text, temperature)


@without_autocast
def block_sigmoid(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    offset: int,
    gradients: bool,
    audio_labels: Tensor | None = None,
    text_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of ``softplus(-y s)`` over a block, ``s`` with the bias, y = 1 for positives, else -1.

    Returns:
        The sum, a scalar; with ``gradients`` also those of audio ``(L, m, d)``, text
        ``(L, n, d)``, temperature ``(L,)`` and bias ``(L,)``, else tensors of shape ``(0,)``.
        Float32 (float64 for float64 latents).
    """
    sims, same = _similarities(audio, text, temperature, offset, audio_labels, text_labels)
    if bias is not None:
        sims = sims + bias.to(sims.dtype)[:, None, None]
    signed = torch.where(same, -sims, sims)
    loss = -F.logsigmoid(-signed).sum()
    if not gradients:
        return loss, sims.new_empty(0), sims.new_empty(0), sims.new_empty(0), sims.new_empty(0)
    ds = torch.where(same, -signed.sigmoid(), signed.sigmoid())
    return loss, *_push(ds, audio, text, temperature), ds.sum(dim=(1, 2))


def _similarities(
    audio: Tensor, text: Tensor, temperature: Tensor, offset: int, audio_labels: Tensor | None,
    text_labels: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    compute = torch.float64 if audio.dtype == torch.float64 else torch.float32
    sims = audio.to(compute) @ text.to(compute).transpose(1, 2)
    sims = sims * temperature.to(compute)[:, None, None]
    if audio_labels is not None and text_labels is not None:
        return sims, audio_labels[:, None] == text_labels[None, :]
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
