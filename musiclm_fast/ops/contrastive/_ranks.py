"""A process group as the losses use it: batch sizes, neighbours, errors that name the rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This rank's place in a process group, and the batch sizes of all."""

    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]  # B of every rank

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def even(self) -> bool:
        """Whether all ranks have the same number of pairs."""
        return len(set(self.sizes)) == 1

    @property
    def start(self) -> int:
        """Global index of this rank's first pair."""
        return self.pairs(self.rank).start

    def pairs(self, rank: int) -> slice:
        """Where a rank's pairs lie in the global batch."""
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def owner(self, step: int) -> int:
        """The rank whose block this rank works on at a step of the ring."""
        return (self.rank - step) % self.world

    def peer(self, distance: int) -> int:
        """Global rank of the neighbour at a distance in the ring."""
        neighbour = (self.rank + distance) % self.world
        return neighbour if self.group is None else dist.get_global_rank(self.group, neighbour)

    @contextlib.contextmanager
    def expect(self, doing: str) -> Iterator[None]:
        """If communication fails, raise an error that names the rank and what it was doing."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"contrastive loss: rank {self.rank} of {self.world} failed while {doing}: a rank "
                f"has died, has left or did not answer within the group's timeout ({error})"
            ) from error

    def gather(self, block: Tensor, doing: str) -> Tensor:
        """All ranks' blocks ``(L, B, d)`` along the batch: ``(L, N, d)``."""
        layers, _, depth = block.shape
        longest = max(self.sizes)
        padded = _pad(block, longest)
        out = block.new_empty(self.world, layers, longest, depth)
        with self.expect(doing):
            collective("all_gather_single", "all_gather_into_tensor")(
                out.view(-1, depth), padded.view(-1, depth), group=self.group
            )
        if layers == 1 and self.even:
            return out.view(1, self.total, depth)
        return torch.cat([out[q, :, :size] for q, size in enumerate(self.sizes)], dim=1)


def collective(name: str, before: str) -> Any:
    """A function of torch.distributed; torch 2.13 renames two, and warns of the names before."""
    return getattr(dist, name, None) or getattr(dist, before)


def _pad(block: Tensor, length: int) -> Tensor:
    """``(L, B, d)`` with zeros up to ``(L, length, d)``, contiguous."""
    missing = length - block.shape[1]
    return torch.nn.functional.pad(block, (0, 0, 0, missing)).contiguous()
