"""Metrics of a joint embedding: recall, zero-shot accuracy, and the loss of a collapsed model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._checks import check_dtype, check_ndim, check_positive_int, check_shape, fail
from musiclm_fast._wording import plural
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.nn.modes import evaluation_mode


def collapsed_loss(batch_size: int, decoupled: bool = True) -> float:
    """The contrastive loss when all similarities are equal, the loss without learning::

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
    so a collapsed model has rank C, not 1.

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
    """Unit vectors ``(n, dim_latent)`` of texts, in eval mode; the model's mode is restored."""
    return _embed(
        mulan,
        range(0, len(texts), batch_size),
        lambda start: mulan.get_text_latents(raw_texts=list(texts[start : start + batch_size])),
    )


@torch.no_grad()
def embed_clips(
    mulan: MuLaN, clips: Callable[[slice], Tensor], count: int, batch_size: int = 128
) -> Tensor:
    """Unit vectors ``(count, dim_latent)`` of clips, in eval mode; the model's mode is restored.

    Args:
        mulan: the model.
        clips: gives the waveforms ``(n, samples)`` of a slice of 0 to count; called per
            batch, so only one batch is in memory.
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
    with evaluation_mode(mulan):
        return torch.cat([embed(start) for start in starts])


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


@dataclass(frozen=True)
class Retrieval:
    """Retrieval metrics.

    Args:
        recall: for each k, the share of queries with a right answer among the k nearest.
        median_rank: of each query's nearest right answer, 1 for the best.
        mean_average_precision: at 10, over all right answers.
        ranks: ``(queries,)`` int64, the rank of each query's nearest right answer.
        candidates: number of candidates.
    """

    recall: dict[int, float]
    median_rank: float
    mean_average_precision: float
    ranks: Tensor
    candidates: int


def retrieval(
    queries: Tensor,
    candidates: Tensor,
    pairs: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    block_bytes: int = 2**26,
) -> Retrieval:
    """Recall, median rank and mAP@10 of queries that may have several right answers::

        rank of the r-th nearest own = r + #{others at least as near as it}
        AP@10 = sum over own with rank <= 10 of (r / rank) / min(10, #own)

    A wrong candidate that ties with a right one counts as nearer. NaN counts as farthest for a
    right candidate and as nearest for a wrong one, so a collapsed model does not score well.

    Args:
        queries: ``(n, d)`` unit vectors.
        candidates: ``(m, d)`` unit vectors, on the same device, as are the pairs.
        pairs: ``(p, 2)`` int64, a query and a right candidate, each pair once; every query has at
            least one.
        ks: numbers of nearest candidates that count.
        block_bytes: similarities of as many queries as fit into this many bytes are held at once,
            never all n x m (one query's at least).

    Raises:
        ValueError, TypeError: wrong shapes or dtypes, no queries, a query without a pair.
    """
    check_ndim("queries", queries, 2, "(n, d)")
    check_shape("candidates", candidates, (None, queries.shape[1]), "(m, d)")
    check_shape("pairs", pairs, (None, 2), "(p, 2)")
    check_dtype("pairs", pairs, torch.int64)
    for k in ks:
        check_positive_int("ks", k)
    count, total = len(queries), len(candidates)
    if not count or not total:
        fail("queries, candidates", f"{count} and {total}", "at least one of each")
    owns = torch.bincount(pairs[:, 0], minlength=count)
    if len(owns) > count or not owns.all():
        fail("pairs", "a query without a candidate of its own", "at least one pair for each query")
    device = queries.device
    order = pairs[:, 0].argsort(stable=True)
    query, own = pairs[order].unbind(1)
    first = owns.cumsum(0) - owns  # of each query's pairs
    found = torch.empty(count, dtype=torch.int64, device=device)
    precision = torch.empty(count, dtype=torch.float64, device=device)
    rows = max(1, block_bytes // (4 * total))
    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        a = int(first[begin])
        b = int(first[end - 1] + owns[end - 1])
        row, column = query[a:b] - begin, own[a:b]
        near = queries[begin:end].float() @ candidates.t().float()  # (rows, m)
        kept = near[row, column].nan_to_num(nan=-torch.inf)
        others = near.nan_to_num(nan=torch.inf)
        others[row, column] = -torch.inf
        # (rows, most right answers of a query), descending; -inf beyond a query's pairs
        place = torch.arange(a, b, device=device) - first[query[a:b]]
        most = int(owns[begin:end].max())
        mine = torch.full((end - begin, most), -torch.inf, device=device)
        mine[row, place] = kept
        mine = mine.topk(min(10, mine.shape[1]), dim=1).values
        score = torch.zeros(end - begin, dtype=torch.float64, device=device)
        limit = owns[begin:end].clamp(max=10)
        for r in range(mine.shape[1]):  # only the ten nearest can have a rank up to 10
            rank = (others >= mine[:, r : r + 1]).sum(dim=1).clamp(max=total - r - 1) + r + 1
            if r == 0:
                found[begin:end] = rank
            counts = (rank <= 10) & (r < limit)
            score += torch.where(counts, (r + 1) / rank.double(), 0.0)
        precision[begin:end] = score / limit
    return Retrieval(
        {k: (found <= k).double().mean().item() for k in ks},
        found.double().quantile(0.5).item(),
        precision.mean().item(),
        found.cpu(),
        total,
    )


def roc_auc(scores: Tensor, relevant: Tensor) -> Tensor:
    """Area under the ROC curve of each label: the probability that a clip with the label scores
    higher than one without it, ties counting half.

    Args:
        scores: ``(n, C)`` floating.
        relevant: ``(n, C)`` bool.

    Returns:
        ``(C,)`` float64; NaN for a label of all clips or of none, or with a NaN among its
        scores.
    """
    check_ndim("scores", scores, 2, "(n, C)")
    check_shape("relevant", relevant, tuple(scores.shape), "of scores")
    check_dtype("relevant", relevant, torch.bool)
    areas = torch.full((scores.shape[1],), torch.nan, dtype=torch.float64)
    for label in range(scores.shape[1]):
        own, other = scores[relevant[:, label], label], scores[~relevant[:, label], label]
        if not len(own) or not len(other) or torch.isnan(scores[:, label]).any():
            continue
        other = other.sort().values
        below = torch.searchsorted(other, own) + torch.searchsorted(other, own, right=True)
        areas[label] = below.double().mean() / (2 * len(other))
    return areas


@dataclass(frozen=True)
class Spread:
    """How an embedding fills the unit sphere; see :func:`spread`.

    Args:
        mean_cosine: of all pairs of different vectors: 1 if all are equal, about 0 if they
            spread evenly.
        effective_rank: number of directions in use, 1 to ``dim``.
        uniformity: log of the mean of ``exp(-2 |x - y|^2)``: 0 if all are equal, about -4 if
            they spread evenly over many dimensions.
        dim: width of the vectors.
        verdict: in words: ``collapsed``, ``narrow`` or ``healthy``, and why.
    """

    mean_cosine: float
    effective_rank: float
    uniformity: float
    dim: int
    verdict: str


_SAMPLE = 4096  # vectors whose pairs the uniformity uses


def spread(latents: Tensor) -> Spread:
    """Whether an embedding has collapsed.

    ``effective_rank = exp(entropy(p))`` with ``p`` the singular values of the centred vectors,
    normalized to sum 1. The uniformity is that of at most 4,096 vectors, evenly spaced in the list.

    Args:
        latents: ``(n, d)`` unit vectors, at least two.

    Sources: https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf (effective
    rank), https://arxiv.org/abs/2005.10242 (uniformity).
    """
    check_ndim("latents", latents, 2, "(n, d)")
    count, dim = latents.shape
    if count < 2:
        fail("latents", plural(count, "vector"), "at least two")
    x = latents.double()
    if not torch.isfinite(x).all():
        return Spread(
            math.nan, math.nan, math.nan, dim, "broken: NaN or infinity among the vectors"
        )
    total = x.sum(dim=0)
    cosine = ((total @ total - (x * x).sum()) / (count * (count - 1))).item()
    centred = x - total / count
    sizes = torch.linalg.eigvalsh(centred.t() @ centred).clamp(min=0).sqrt()
    rank = 1.0
    if sizes.sum() > 1e-6 * math.sqrt(count):
        share = sizes / sizes.sum()
        rank = torch.special.entr(share).sum().exp().item()
    some = x[torch.linspace(0, count - 1, min(count, _SAMPLE)).round().long()]
    logs = []
    for begin in range(0, len(some), 512):
        distance = (2 - 2 * some[begin : begin + 512] @ some.t()).clamp(min=0)  # |x - y|^2
        distance.diagonal(begin).fill_(torch.inf)
        logs.append((-2 * distance).flatten().logsumexp(dim=0))
    pairs = len(some) * (len(some) - 1)
    uniformity = (torch.stack(logs).logsumexp(dim=0) - math.log(pairs)).item()
    return Spread(cosine, rank, uniformity, dim, _verdict(cosine, rank, min(dim, count - 1)))


def _verdict(cosine: float, rank: float, most: int) -> str:
    facts = f"mean cosine {cosine:.2f}, {rank:.1f} of at most {most} directions in use"
    if cosine > 0.98:
        return f"collapsed: all vectors are nearly equal ({facts})"
    if most >= 8 and rank < 2:
        return f"collapsed: the vectors lie on a line ({facts})"
    if cosine > 0.8 or rank < 0.1 * most:
        return f"narrow: the vectors use a small part of the space ({facts})"
    return f"healthy ({facts})"
