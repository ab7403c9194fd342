"""How good a joint embedding is: recall, zero-shot accuracy, and the loss of a collapsed model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._checks import check_dtype, check_ndim, check_positive_int, check_shape, fail
from musiclm_fast.models.mulan import MuLaN


def collapsed_loss(batch_size: int, decoupled: bool = True) -> float:
    """The contrastive loss when all similarities are equal, which no learning ever beats::

        ln(B - 1) decoupled,  ln B otherwise

    Args:
        batch_size: pairs per step, B.
        decoupled: whether the positive pair is left out of the denominators.
    """
    smallest = 2 if decoupled else 1
    if batch_size < smallest:
        fail("batch_size", batch_size, f"at least {smallest}")
    return math.log(batch_size - 1 if decoupled else batch_size)


def ranks(similarities: Tensor, targets: Tensor) -> Tensor:
    """Rank of the right column in each row, 1 for the best.

    A column that ties with the right one counts as better, and a NaN is better than everything,
    so that a collapsed model has rank C, not 1.

    Args:
        similarities: ``(n, C)``.
        targets: ``(n,)`` int64, the right column of each row.

    Returns:
        ``(n,)`` int64 from 1 to C.
    """
    check_ndim("similarities", similarities, 2, "(n, C)")
    check_shape("targets", targets, (similarities.shape[0],), "(n,)")
    check_dtype("targets", targets, torch.int64)
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < similarities.shape[1]:
        fail("targets", targets.tolist(), f"columns from 0 to {similarities.shape[1] - 1}")
    right = similarities.gather(1, targets[:, None])
    return (~(similarities < right)).sum(dim=1)


def recall_at_k(
    similarities: Tensor, targets: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of rows whose right column is among the k most similar, for each k.

    Args:
        similarities: ``(n, C)``, rows are queries.
        targets: ``(n,)`` int64; None means that row i belongs to column i.
        ks: how many of the best count.

    Returns:
        ``{k: recall in [0, 1]}``.
    """
    check_ndim("similarities", similarities, 2, "(n, C)")
    if not len(similarities):
        fail("similarities", "no rows", "at least one")
    if targets is None:
        targets = torch.arange(len(similarities), device=similarities.device)
    place = ranks(similarities, targets)
    for k in ks:
        check_positive_int("ks", k)
    return {k: (place <= k).double().mean().item() for k in ks}


@torch.no_grad()
def embed_texts(mulan: MuLaN, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Unit vectors ``(n, dim_latent)`` of texts, in eval mode; the model's mode is put back."""
    return _embed(
        mulan,
        range(0, len(texts), batch_size),
        lambda start: mulan.get_text_latents(raw_texts=list(texts[start : start + batch_size])),
    )


@torch.no_grad()
def embed_clips(
    mulan: MuLaN, clips: Callable[[slice], Tensor], count: int, batch_size: int = 128
) -> Tensor:
    """Unit vectors ``(count, dim_latent)`` of clips, in eval mode; the model's mode is put back.

    Args:
        mulan: the model.
        clips: gives the waveforms ``(n, samples)`` of a slice of 0 to count; called batch by
            batch, so that only one batch is ever in memory.
        count: number of clips.
        batch_size: clips per forward pass.
    """
    device = mulan.audio_to_latents.weight.device
    starts = range(0, count, batch_size)
    return _embed(
        mulan,
        starts,
        lambda start: mulan.get_audio_latents(
            clips(slice(start, min(start + batch_size, count))).to(device)
        ),
    )


def _embed(mulan: MuLaN, starts: Iterable[int], embed: Callable[[int], Tensor]) -> Tensor:
    training = mulan.training
    mulan.eval()
    try:
        return torch.cat([embed(start) for start in starts])
    finally:
        mulan.train(training)


def label_latents(mulan: MuLaN, prompts: Sequence[Sequence[str]]) -> Tensor:
    """One unit vector per label: the mean of its prompts' unit vectors, normalised again.

    Args:
        mulan: the model.
        prompts: for each label one or more texts.

    Returns:
        ``(labels, dim_latent)``.

    Source: prompt ensembles, https://arxiv.org/abs/2103.00020.
    """
    if not prompts or not all(prompts):
        fail("prompts", "a label without a text", "at least one text for each label")
    flat = [text for texts in prompts for text in texts]
    latents = embed_texts(mulan, flat).split([len(texts) for texts in prompts])
    return F.normalize(torch.stack([group.mean(dim=0) for group in latents]), dim=-1)


def zero_shot_accuracy(
    audio_latents: Tensor, label_latents: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Share of clips whose label is among the k whose texts are most similar.

    Args:
        audio_latents: ``(n, d)`` unit vectors of the clips.
        label_latents: ``(C, d)`` unit vectors of the labels, see :func:`label_latents`.
        labels: ``(n,)`` int64, the right label of each clip.
        ks: 1 for plain accuracy, 5 for top-5, and so on.

    Returns:
        ``{k: accuracy in [0, 1]}``; chance is ``k / C``.
    """
    check_ndim("audio_latents", audio_latents, 2, "(n, d)")
    check_shape("label_latents", label_latents, (None, audio_latents.shape[1]), "(C, d)")
    return recall_at_k(audio_latents @ label_latents.t(), labels, ks)
