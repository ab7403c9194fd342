"""The checkpoints of a run, each written whole or not at all, and its log.

::

    mulan.1000/             a checkpoint, named by its step
        model.safetensors   weights: what validation measured (the average, where there is one)
        config.json         architecture; MuLaN.from_pretrained reads these two
        trainer.pt          what training goes on from: plain values and tensors
    latest -> mulan.1000    the newest
    best -> mulan.600       the best by validation
    log.jsonl               a line of numbers per logged step

A stage's checkpoint is one file, ``semantic.transformer.1000.pt``, with links and a log of its own
(``semantic.latest``, ``semantic.best``, ``semantic.log.jsonl``), so that three stages can share a
folder as with audiolm-pytorch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musiclm_fast._files import (
    atomic_file,
    atomic_folder,
    point_link,
    remove_folder,
    remove_leftovers,
)
from musiclm_fast.models.pretrained import CONFIG_FILE, WEIGHTS_FILE

STATE_FILE = "trainer.pt"


@dataclass(frozen=True)
class Form:
    """How the checkpoints of a run are named.

    Args:
        prefix, suffix: around the step in a checkpoint's name.
        files: what a checkpoint's folder holds; empty where it is a file.
        latest, best: the links to the newest and the best.
        log: the log's name.
    """

    prefix: str
    suffix: str = ""
    files: tuple[str, ...] = ()
    latest: str = "latest"
    best: str = "best"
    log: str = "log.jsonl"

    def name(self, step: int | str) -> str:
        """The name of a step's checkpoint."""
        return f"{self.prefix}{step}{self.suffix}"

    def complete(self, path: Path) -> bool:
        """Whether a checkpoint is all there."""
        return all((path / name).is_file() for name in self.files) if self.files else path.is_file()


MULAN = Form("mulan.", files=(CONFIG_FILE, WEIGHTS_FILE, STATE_FILE))


def stage_form(stage: str) -> Form:
    """The form of a stage's checkpoints: single files, as audiolm-pytorch names them."""
    links = f"{stage}.latest", f"{stage}.best", f"{stage}.log.jsonl"
    return Form(f"{stage}.transformer.", ".pt", (), *links)


class RunFolder:
    """The checkpoints in a folder, and which of them stay.

    Args:
        folder: is made with the first checkpoint.
        form: names of the checkpoints.
        keep_last: when a checkpoint is written, this run's older ones are deleted but for the
            newest ``keep_last`` (this one included) and the best ``keep_best``. None, the default,
            deletes nothing.
        keep_best: see there.
        higher_is_better: of the scores.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        form: Form = MULAN,
        keep_last: int | None = None,
        keep_best: int = 1,
        higher_is_better: bool = False,
    ) -> None:
        self.folder, self.form = Path(folder), form
        self.keep_last, self.keep_best = keep_last, keep_best
        self.higher_is_better = higher_is_better
        self.scores: dict[int, float] = {}  # step: validation's score, of checkpoints that are here
        self.own: set[int] = set()  # steps whose checkpoints are this run's; no other is deleted

    def checkpoints(self) -> dict[int, Path]:
        """Complete checkpoints by step, oldest first."""
        found = {}
        for path in self.folder.glob(self.form.name("*")):
            step = path.name.removeprefix(self.form.prefix).removesuffix(self.form.suffix)
            if re.fullmatch(r"\d+", step) and self.form.complete(path):
                found[int(step)] = path
        return dict(sorted(found.items()))

    def latest(self) -> Path | None:
        """The checkpoint that was written last."""
        there = self.checkpoints()
        linked = (self.folder / self.form.latest).resolve()
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
            write: fills the folder it is given, or writes the file it is given, atomically.

        Raises:
            OSError: it could not be written. What was there before is as it was, and the message
                names the checkpoint to go on from.
        """
        before = self.latest()
        path = self.folder / self.form.name(step)
        scores = dict(self.scores)
        try:
            if score is None:
                self.scores.pop(step, None)
            else:
                self.scores[step] = score
            if self.form.files:
                with atomic_folder(path) as temporary:
                    write(temporary)
            else:
                write(path)
        except OSError as error:
            self.scores = scores
            left = "there is no earlier one" if before is None else f"{before} is as it was"
            raise OSError(f"checkpoint of step {step}: {error}; {left}") from error
        point_link(self.folder / self.form.latest, path.name)
        self._prune(step)
        best = self.folder / self.form.best
        if ranked := self.ranked():
            point_link(best, self.form.name(ranked[0]))
        elif best.is_symlink() and not best.exists():
            best.unlink()  # what it pointed at was deleted
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
                _remove(path)
        self.own &= kept
        self.scores = {step: score for step, score in self.scores.items() if step in kept}

    def clean(self) -> None:
        """Delete what a killed process left half-written."""
        for name in (self.form.prefix, self.form.latest, self.form.best, self.form.log):
            remove_leftovers(self.folder, name)

    def clear(self) -> None:
        """Delete the run: its checkpoints, links and log, and nothing else in the folder."""
        self.clean()
        for path in self.checkpoints().values():
            _remove(path)
        for name in (self.form.latest, self.form.best):
            if (self.folder / name).is_symlink():
                (self.folder / name).unlink()
        (self.folder / self.form.log).unlink(missing_ok=True)
        self.scores, self.own = {}, set()

    def log(self, entry: dict[str, Any]) -> None:
        """Append a line to ``log.jsonl``; numbers that are not finite become null."""
        entry = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in entry.items()
        }
        with open(self.folder / self.form.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log, without broken ones."""
        path = self.folder / self.form.log
        if not path.is_file():
            return []
        lines = map(_parsed, path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line is not None]

    def cut_log(self, step: int) -> None:
        """Drop lines of steps after ``step``, which a resumed run writes again, and broken ones."""
        kept = [line for line in self.read_log() if line.get("step", 0) <= step]
        if kept or (self.folder / self.form.log).is_file():
            with atomic_file(self.folder / self.form.log) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:  # cut short by a kill
        return None
    return content if isinstance(content, dict) else None


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_folder(path)
    else:
        path.unlink()
