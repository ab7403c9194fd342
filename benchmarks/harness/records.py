"""The settings of a benchmark, its contenders and its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.timing import Timing

MODES = ("quick", "full", "gpu")


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    Args:
        mode: ``"quick"`` (float32, eager, slow upstream jobs once), ``"full"`` (every peer and
            mode) or ``"gpu"``.
        device: ``"cpu"`` or ``"cuda"``.
        tiny: the smallest sizes that still run every line, to test the benchmark itself.
        only_ours: without peers, to compare two commits.
        case: measure only cases whose name contains this text.
    """

    mode: str = "quick"
    device: str = "cpu"
    tiny: bool = False
    only_ours: bool = False
    case: str = ""

    def pick(self, quick: Any, full: Any = None, gpu: Any = None, tiny: Any = None) -> Any:
        """The value for this mode; ``full`` and ``gpu`` are ``quick``'s unless given."""
        if self.tiny and tiny is not None:
            return tiny
        chosen = {"quick": quick, "full": full, "gpu": gpu}[self.mode]
        return quick if chosen is None else chosen


@dataclass(frozen=True)
class Contender:
    """A candidate to be timed.

    Args:
        build: makes the callable to run; if it raises, the reason is listed.
        memory: peak memory of one run in bytes, measured separately; None if not measured.
        operations: floating-point operations of one run; traffic: bytes that it must move.
        once: too slow to repeat; runs in the first round only, without a warm-up.
        apart: for slow and large runs: seconds and peak memory in bytes of one run in a fresh
            process, instead of ``build`` and ``memory``.
        role: ``"ours"``, ``"peer"``, or ``"bound"``: work that every implementation must do.
    """

    build: Callable[[], Callable[[], Any]]
    memory: Callable[[], int] | None = None
    operations: float | None = None
    traffic: float | None = None
    once: bool = False
    apart: Callable[[], tuple[float, int]] | None = None
    role: str = "peer"


@dataclass(frozen=True)
class Result:
    """One contender of one case, as it is stored.

    Args:
        job: the op or whole job.
        case: its shape, in words.
        contender: its name, with its mode.
        role: as in :class:`Contender`.
        seconds: of each interleaved round; empty if it did not run.
        operations, traffic: floating-point operations and bytes of one run, if counted.
        memory: peak memory in bytes beyond the memory held before, if measured.
        reason: why it did not run.
        note: a finding other than a time.
        axes: x values for charts, such as seconds of audio or pairs of a batch.
        headline: of ours: the name of this case in README's table; "" leaves it out.
    """

    job: str
    case: str
    contender: str
    role: str = "peer"
    seconds: list[float] = field(default_factory=list)
    operations: float | None = None
    traffic: float | None = None
    memory: int | None = None
    reason: str = ""
    note: str = ""
    axes: dict[str, float] = field(default_factory=dict)
    headline: str = ""

    @property
    def ours(self) -> bool:
        return self.role == "ours"

    @property
    def timing(self) -> Timing:
        return Timing(self.seconds)

    @property
    def tflops(self) -> float | None:
        """Operations per second, in 10**12."""
        if self.operations is None or not self.seconds:
            return None
        return self.operations / self.timing.median / 1e12

    @property
    def gigabytes_per_second(self) -> float | None:
        """Counted traffic per second, in 10**9 bytes."""
        if self.traffic is None or not self.seconds:
            return None
        return self.traffic / self.timing.median / 1e9
