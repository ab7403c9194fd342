"""k-means, for codebooks and semantic tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import check_ndim, check_positive_int


def nearest(points: Tensor, centres: Tensor, chunk: int = 16_384) -> tuple[Tensor, Tensor]:
    """Index of and squared distance to each point's nearest centre, ``(N,)`` each."""
    squares = centres.square().sum(dim=1)
    indices, distances = [], []
    for part in points.split(chunk):
        scores = torch.addmm(squares, part, centres.t(), alpha=-2)  # distance less |point|^2
        least, index = scores.min(dim=1)
        indices.append(index)
        distances.append((least + part.square().sum(dim=1)).clamp_min(0))
    return torch.cat(indices), torch.cat(distances)


@torch.no_grad()
def kmeans(
    points: Tensor, clusters: int, iterations: int = 25, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from a random sample, empty clusters moved to the worst-served points.

    Args:
        points: ``(N, dim)`` floating. With fewer points than clusters some centres coincide.
        clusters: number of centres.
        iterations: at most; it stops when no point changes its centre.
        generator: of the first centres, on the CPU.

    Returns:
        Centres ``(clusters, dim)`` and how many points belong to each ``(clusters,)``.
    """
    check_ndim("points", points, 2, "(N, dim)")
    check_positive_int("clusters", clusters)
    count = points.shape[0]
    order = torch.randperm(count, generator=generator)
    order = order.repeat(-(-clusters // count))[:clusters].to(points.device)
    centres = points[order].clone()
    before = None
    for _ in range(iterations):
        index, distance = nearest(points, centres)
        if before is not None and torch.equal(index, before):
            break
        before = index
        sizes = torch.bincount(index, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, index, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
        empty = (sizes == 0).nonzero().squeeze(1)[: int((distance > 0).sum())]
        if empty.numel():
            centres[empty] = points[distance.topk(min(empty.numel(), count)).indices][: len(empty)]
    index, _ = nearest(points, centres)
    return centres, torch.bincount(index, minlength=clusters).to(points.dtype)
