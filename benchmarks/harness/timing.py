"""Interleaved timing."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over all rounds of an interleaved run."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    contenders: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Time the contenders interleaved, A B A B ...: drift of the machine affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + rounds):
        for name, run in contenders.items():
            seconds = timed(run)
            if round_ >= warmup:
                times[name].append(seconds)
    return {name: Timing(seconds) for name, seconds in times.items()}


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Median, minimum and maximum of the ratio per round; a contender that ran once is compared
    with each round of the other."""
    a, b = slow.seconds, fast.seconds
    if len(a) != len(b) and min(len(a), len(b)) == 1:
        a, b = a * max(1, len(b) // len(a)), b * max(1, len(a) // len(b))
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run, including its work on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch runs on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def imports_uncollected() -> Iterator[None]:
    """No garbage collection of what is imported inside."""
    # Otherwise each collection before a run walks upstream's imports, a quarter of a second.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
