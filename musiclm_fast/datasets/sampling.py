"""The order of batches, and rows as a function of the seed and their position in the order."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from musiclm_fast._wording import plural

Key = tuple[int, int]  # row of the dataset and its position in the order of all draws


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of endless epochs, from any position.

    The order of an epoch is a function of seed and epoch only, so a resumed run continues with
    the batch at which it stopped. An incomplete last batch is dropped.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int = 0) -> None:
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while True:
            epoch, first = divmod(position, self.per_epoch)
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            for index in range(first, self.per_epoch):
                yield order[index * self.batch_size : (index + 1) * self.batch_size]
            position = (epoch + 1) * self.per_epoch


class EveryNth(Sampler[list[int]]):
    """One process's share of the batches: every ``processes``-th, from ``index`` on."""

    def __init__(self, batches: EpochBatches, processes: int, index: int) -> None:
        self.batches, self.processes, self.index = batches, processes, index

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.batches), self.index, None, self.processes)


class SharedBatches(Sampler[list[Key]]):
    """One process's rows of batches that all processes share.

    Process i of n takes the i-th part of n of every global batch, so n processes together see
    the same batches as one with n times the batch size.

    Args:
        batches: the global batches.
        processes: number of processes that share each.
        index: of this process.
    """

    def __init__(self, batches: EpochBatches, processes: int, index: int) -> None:
        self.batches, self.own = batches, batches.batch_size // processes
        self.first = index * self.own

    def __iter__(self) -> Iterator[list[Key]]:
        for number, batch in enumerate(self.batches, self.batches.start):
            place = number * self.batches.batch_size + self.first
            rows = batch[self.first : self.first + self.own]
            yield [(row, place + i) for i, row in enumerate(rows)]


class SeededRows(Dataset[Any]):
    """Rows of a dataset, each drawn with its own random state.

    If the dataset has a method ``draw(index, seed)``, it is used. Otherwise the dataset is indexed
    with seeded generators of torch (on the CPU), numpy and Python, which are restored afterwards.
    So random crops depend only on the seed and a row's position in the order, not on workers or
    interruptions.

    Args:
        dataset: the rows.
        seed: of all draws.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Any]:
        """The rows of a batch; the generators are restored once for all of them."""
        with _generators_kept():
            return [self._row(*key) for key in keys]

    def _row(self, index: int, place: int) -> Any:
        digest = hashlib.blake2b(f"{self.seed} {place}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "big") >> 1
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            index, dataset = dataset.indices[index], dataset.dataset
        if hasattr(dataset, "draw"):
            return dataset.draw(index, seed)
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - what a dataset that knows no Generator uses
        random.seed(seed)
        return dataset[index]


class FixedRows(Dataset[Any]):
    """The rows of a dataset by index, the same each time, whatever it draws.

    Args:
        dataset: the rows.
        seed: of all draws.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.rows = SeededRows(dataset, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, expected one of {plural(len(self), 'row')}")
        return self.rows[index, index]


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    # As they are: random_state would turn them into plain values.
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def training_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int,
    start: int,
    processes: int,
    index: int,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[dict[str, Any]]:
    """This process's endless batches from batch ``start`` on.

    Args:
        dataset: the rows.
        batch_size: rows per batch and process.
        seed: of the order and of the rows.
        start: number of batches that each process has seen.
        processes, index: number of processes that share the batches, and this one's index.
        collate: makes a batch of rows.
        num_workers: processes that read rows ahead; 0 reads them on demand.
        pin_memory: whether batches are in pinned memory.
    """
    order = EpochBatches(len(dataset), batch_size * processes, seed, start)  # type: ignore[arg-type]
    loader = DataLoader(
        SeededRows(dataset, seed),
        batch_sampler=SharedBatches(order, processes, index),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Else an iterator would draw its workers' seed from the model's generator.
        generator=torch.Generator().manual_seed(seed),
    )
    return iter(loader)
