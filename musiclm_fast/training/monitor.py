"""Monitors of a run: numbers read from the device without waiting, speed, skips, collapse."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from musiclm_fast._wording import plural
from musiclm_fast.evaluation.metrics import collapsed_loss
from musiclm_fast.models.losses import SigmoidContrastiveLearning
from musiclm_fast.models.mulan import MuLaN

_LATE = 8  # steps that a number may be read late


class Readings:
    """A few numbers per step, read from the device when they are there, in the order of steps.

    On a GPU they are copied while it works on the next steps, so that reading stops nothing; after
    8 steps the host waits. On the CPU they are there at once.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, values: Tensor) -> None:
        """Add a step's numbers ``(n,)``."""
        event = None
        if values.device.type == "cuda":
            there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = there.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, values, event))

    def take(self, wait: bool = False) -> list[tuple[int, list[float]]]:
        """The steps whose numbers are there, with them; with ``wait`` all."""
        ready = []
        while self._pending:
            step, values, event = self._pending[0]
            if event is not None:
                if wait or len(self._pending) > _LATE:
                    event.synchronize()
                elif not event.query():
                    break
            self._pending.popleft()
            ready.append((step, values.tolist()))
        return ready


class Speed:
    """Clips and seconds of audio per second over the last steps, pauses left out.

    Args:
        sample_hz: rate of the clips; None where it is not known, and no audio is counted.
        processes: how many do the same.
        window: steps that are looked at.
    """

    def __init__(self, sample_hz: int | None, processes: int = 1, window: int = 50) -> None:
        self.sample_hz, self.processes = sample_hz, processes
        self._clips = self._samples = 0
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=window + 1)

    def add(self, clips: int, samples: int) -> None:
        """Count a batch."""
        if not self._marks:
            self._mark()
        self._clips += clips
        self._samples += samples

    def step(self) -> None:
        """A step is done."""
        self._mark()

    def pause(self) -> None:
        """What happens until the next batch is no training."""
        self._marks.clear()

    def rates(self) -> dict[str, float]:
        """``samples/s`` and, where the rate is known, ``s audio/s``; empty before any step."""
        if len(self._marks) < 2:
            return {}
        (began, clips, samples), (ended, all_clips, all_samples) = self._marks[0], self._marks[-1]
        elapsed = max(ended - began, 1e-9) / self.processes
        rates = {"samples/s": (all_clips - clips) / elapsed}
        if self.sample_hz is not None:
            rates["s audio/s"] = (all_samples - samples) / self.sample_hz / elapsed
        return rates

    def _mark(self) -> None:
        self._marks.append((time.perf_counter(), self._clips, self._samples))


@dataclass
class SkippedSteps:
    """Counts steps that were skipped since their loss or gradient was not finite.

    Args:
        most: so many in a row end the training.
    """

    most: int
    total: int = 0
    in_a_row: int = 0

    def note(self, step: int, skipped: bool) -> None:
        """Count a step.

        Raises:
            FloatingPointError: too many in a row.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if self.in_a_row >= self.most:
            raise FloatingPointError(
                "the loss or its gradient was not finite in "
                f"{plural(self.in_a_row, 'step')} in a row, up to step {step} ({self.total} in "
                "all); the weights are those before these steps. Try a lower learning rate, a "
                "longer warm-up, a smaller max_grad_norm or another precision, and check the data"
            )


def loss_without_learning(mulan: MuLaN, batch_size: int) -> float:
    """MuLaN's loss of a batch where all similarities are equal: what a collapsed model has.

    ln(B - 1) decoupled, ln B for the plain softmax, per layer of the hierarchical loss; for the
    sigmoid loss ``ln B + (B - 1) ln(B / (B - 1))``, its least value over all constants.
    """
    contrast = mulan.contrast
    layers = 1
    if mulan.multi_layer_contrastive_learning is not None:
        layers += mulan.multi_layer_contrastive_learning.contrast.temperatures.shape[0]
    if isinstance(contrast, SigmoidContrastiveLearning):
        others = batch_size - 1
        each = math.log(batch_size) + others * math.log(batch_size / others)
    else:
        each = collapsed_loss(batch_size, contrast.decoupled_contrastive_learning)
    return layers * each


@dataclass
class CollapseMonitor:
    """Notices that the loss has not left that of a model whose similarities are all equal.

    Args:
        level: that loss, see :func:`loss_without_learning`.
        after: steps (of warm-up) that do not count.
        window: losses that are looked at.
        tolerance: how near to the level, as a share of it, both halves' means must be.
    """

    level: float
    after: int = 0
    window: int = 200
    tolerance: float = 0.01
    recent: deque[float] = field(default_factory=deque)
    warned: bool = False

    def note(self, step: int, loss: float) -> str | None:
        """Add a step's loss; a warning, once, if there is one to give."""
        if self.warned or step <= self.after or not math.isfinite(loss):
            return None
        self.recent.append(loss)
        if len(self.recent) < self.window:
            return None
        while len(self.recent) > self.window:
            self.recent.popleft()
        losses = list(self.recent)
        half = self.window // 2
        if not (self._near(losses[:half]) and self._near(losses[half:])):
            return None
        self.warned = True
        mean = sum(losses) / len(losses)
        return (
            f"the loss has been at {mean:.3f} for {plural(self.window, 'step')}, up to step "
            f"{step}; {self.level:.3f} is its value when all similarities are equal: the model "
            "learns nothing. Check that captions differ and belong to their clips (`musiclm-fast "
            'data check`), use a log-mel front end (front_end="mulan", not "upstream"), a learning '
            "rate that is 3 to 10 times lower or higher with a warm-up, a larger batch, and text "
            "embeddings that start small"
        )

    def _near(self, losses: Sequence[float]) -> bool:
        return abs(sum(losses) / len(losses) - self.level) <= self.tolerance * self.level
