"""A process group as the losses use it: batch sizes, neighbours, errors that name the rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist


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
        return sum(self.sizes[: self.rank])

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
