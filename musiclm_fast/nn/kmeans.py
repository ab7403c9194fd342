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


def _spread(points: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    # k-means++: each centre is a point, drawn by its squared distance to those before
    centres = points.new_empty(clusters, points.shape[1])
    chosen = torch.randint(points.shape[0], (), generator=generator).to(points.device)
    distance = points.new_full((points.shape[0],), torch.inf)
    draws = torch.rand(clusters, generator=generator).to(points)
    for index in range(clusters):
        centres[index] = points[chosen]
        distance = torch.minimum(distance, (points - centres[index]).square().sum(dim=1))
        total = distance.cumsum(0)
        # if every point is a centre already, the first one is repeated
        chosen = torch.searchsorted(total, draws[index] * total[-1]).clamp_max(len(points) - 1)
    return centres


@torch.no_grad()
def kmeans(
    points: Tensor, clusters: int, iterations: int = 25, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from k-means++ centres, empty clusters moved to the farthest points.

    https://doi.org/10.1145/1283383.1283494

    Args:
        points: ``(N, dim)`` floating. With fewer points than clusters some centres coincide.
        clusters: number of centres.
        iterations: at most; it stops when no point changes its centre.
        generator: of the first centres, on the CPU.

    Returns:
        Centres ``(clusters, dim)`` and the number of points of each ``(clusters,)``.
    """
    check_ndim("points", points, 2, "(N, dim)")
    check_positive_int("clusters", clusters)
    count = points.shape[0]
    centres = _spread(points, clusters, generator)
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
