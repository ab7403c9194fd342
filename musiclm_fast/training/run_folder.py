"""The checkpoints of a run: a folder each, written whole or not at all.

::

    mulan.1000/             a checkpoint, named by its step
        model.safetensors   weights: what validation measured (the average, where there is one)
        config.json         architecture; MuLaN.from_pretrained reads these two
        trainer.pt          what training goes on from: plain values and tensors
    latest -> mulan.1000    the newest
    best -> mulan.600       the best by validation
    log.jsonl               a line of numbers per logged step
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast._files import (
    atomic_file,
    atomic_folder,
    point_link,
    remove_folder,
    remove_leftovers,
)
from musiclm_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE

STATE_FILE, LOG_FILE = "trainer.pt", "log.jsonl"
LATEST, BEST = "latest", "best"
_PREFIX = "mulan."


class RunFolder:
    """The checkpoints in a folder, and which of them stay.

    Args:
        folder: is made with the first checkpoint.
        keep_last: when a checkpoint is written, this run's older ones are deleted but for the
            newest ``keep_last`` (this one included) and the best ``keep_best``. None, the default,
            deletes nothing.
        keep_best: see there.
        higher_is_better: of the scores.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep_last: int | None = None,
        keep_best: int = 1,
        higher_is_better: bool = False,
    ) -> None:
        if keep_last is not None:
            check_positive_int("keep_last", keep_last)
        if isinstance(keep_best, bool) or not isinstance(keep_best, int) or keep_best < 0:
            fail("keep_best", repr(keep_best), "an integer of at least 0")
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self.higher_is_better = higher_is_better
        self.scores: dict[int, float] = {}  # step: validation's score, of checkpoints that are here
        self.own: set[int] = set()  # steps whose checkpoints are this run's; no other is deleted

    def checkpoints(self) -> dict[int, Path]:
        """Complete checkpoints by step, oldest first."""
        found = {}
        for path in self.folder.glob(f"{_PREFIX}*"):
            step = path.name.removeprefix(_PREFIX)
            files = (CONFIG_FILE, WEIGHTS_FILE, STATE_FILE)
            if re.fullmatch(r"\d+", step) and all((path / name).is_file() for name in files):
                found[int(step)] = path
        return dict(sorted(found.items()))

    def latest(self) -> Path | None:
        """The checkpoint that was written last."""
        there = self.checkpoints()
        linked = (self.folder / LATEST).resolve()
        if linked in [path.resolve() for path in there.values()]:
            return self.folder / linked.name
        return list(there.values())[-1] if there else None

    def adopt(self, scores: dict[int, float]) -> None:
        """Go on with the run whose checkpoints are here: take them, and their scores, as own."""
        self.own = set(self.checkpoints())
        self.scores = {step: score for step, score in scores.items() if step in self.own}

    def ranked(self) -> list[int]:
        """Steps with a score, best first; of equals the earlier one."""
        sign = -1 if self.higher_is_better else 1
        known = [step for step, score in self.scores.items() if math.isfinite(score)]
        return sorted(known, key=lambda step: (sign * self.scores[step], step))

    def save(self, step: int, score: float | None, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint, point ``latest`` and ``best``, delete what need not stay.

        Args:
            step: of the checkpoint; one of the same step is replaced.
            score: validation's, if it was measured at this step.
            write: fills the folder it is given with the three files.

        Raises:
            OSError: it could not be written. What was there before is as it was, and the message
                names the checkpoint to go on from.
        """
        before = self.latest()
        path = self.folder / f"{_PREFIX}{step}"
        scores = dict(self.scores)
        try:
            if score is None:
                self.scores.pop(step, None)
            else:
                self.scores[step] = score
            with atomic_folder(path) as temporary:
                write(temporary)
        except OSError as error:
            self.scores = scores
            left = "there is no earlier one" if before is None else f"{before} is as it was"
            raise OSError(f"checkpoint of step {step}: {error}; {left}") from error
        point_link(self.folder / LATEST, path.name)
        if best := self.ranked():
            point_link(self.folder / BEST, f"{_PREFIX}{best[0]}")
        self._prune(step)
        return path

    def _prune(self, newest: int) -> None:
        self.own.add(newest)
        if self.keep_last is None:
            return
        # After an earlier checkpoint was loaded, it is the later steps' that are old.
        order = sorted(self.own, key=lambda step: (step == newest, step))
        kept = {*order[-self.keep_last :], *self.ranked()[: self.keep_best]}
        for step, path in self.checkpoints().items():
            if step in self.own - kept:
                remove_folder(path)
        self.own &= kept
        self.scores = {step: score for step, score in self.scores.items() if step in kept}

    def clean(self) -> None:
        """Delete what a killed process left half-written."""
        for name in (_PREFIX, LATEST, BEST, LOG_FILE):
            remove_leftovers(self.folder, name)

    def clear(self) -> None:
        """Delete the run: its checkpoints, links and log, and nothing else in the folder."""
        self.clean()
        for path in self.checkpoints().values():
            remove_folder(path)
        for name in (LATEST, BEST):
            if (self.folder / name).is_symlink():
                (self.folder / name).unlink()
        (self.folder / LOG_FILE).unlink(missing_ok=True)
        self.scores, self.own = {}, set()

    def log(self, entry: dict[str, Any]) -> None:
        """Append a line to ``log.jsonl``; numbers that are not finite become null."""
        entry = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        with open(self.folder / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop lines of steps after ``step``, which a resumed run writes again, and broken ones."""
        path = self.folder / LOG_FILE
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with_step = _parsed(line)
            if with_step is not None and with_step.get("step", 0) <= step:
                kept.append(line + "\n")
        with atomic_file(path) as file:
            file.write("".join(kept).encode())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:  # cut short by a kill
        return None
    return content if isinstance(content, dict) else None
