"""What a run says: on the terminal, in its log file, to its trackers and on its progress bar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from musiclm_fast._progress import progress_bar
from musiclm_fast._wording import plural
from musiclm_fast.training.accelerated import Accelerator, gather_object
from musiclm_fast.training.run_folder import RunFolder

Log = dict[str, float]
_NAMED = 20  # sounds that could not be read and are named at once; the others at the end


class RunLog:
    """The messages and numbers of a run; each is written once, not once per process.

    Args:
        run: where ``log.jsonl`` is.
        accelerator: of the processes, and of the trackers.
        task: what the progress bar is called.
        names: of the numbers that it shows.
    """

    def __init__(
        self, run: RunFolder, accelerator: Accelerator, task: str, names: Sequence[str]
    ) -> None:
        self.run, self.accelerator, self.task, self.names = run, accelerator, task, names
        #: (name, reason) of sounds that could not be read: how often
        self.skipped_rows: Counter[tuple[str, str]] = Counter()
        self._failed = False
        self._shown: dict[str, str] = {}

    def print(self, message: str) -> None:
        """Print above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)

    def numbers(self, step: int, entry: dict[str, Any]) -> None:
        """A step's numbers, for the trackers and the log."""
        self.accelerator.log(entry, step=step)
        self.line({"step": step, **entry})

    def line(self, entry: dict[str, Any]) -> None:
        """A line of ``log.jsonl``. One that cannot be written is warned about, once."""
        if not self.accelerator.is_main_process:
            return
        try:
            self.run.log(entry)
        except OSError as error:  # a full disk: what was learned is worth more than its log
            if not self._failed:
                self.print(f"warning: {self.run.folder}: the log cannot be written ({error})")
            self._failed = True

    def skipped(self, rows: Sequence[Any]) -> None:
        """Sounds that could not be read and were replaced by others."""
        for name, reason, *_ in rows:
            self.skipped_rows[name, reason] += 1
            if self.skipped_rows[name, reason] == 1 and len(self.skipped_rows) <= _NAMED:
                tqdm.write(f"skipped {name}: {reason}")

    def bar(self, total: int, done: int) -> Any:
        """The progress bar of the run, in the first process of each machine."""
        return progress_bar(
            total=total, initial=done, unit="step", desc=self.task,
            disable=not self.accelerator.is_local_main_process,
        )  # fmt: skip

    def show(
        self,
        bar: Any,
        logs: list[Log],
        rates: dict[str, float],
        log_fn: Callable[[Log], Any] | None,
        steps: int = 1,
    ) -> None:
        """Hand the logs to ``log_fn``, and move the bar by ``steps``."""
        for log in logs:
            if log_fn is not None:
                log_fn(log)
        if logs and self.accelerator.is_local_main_process:
            self._shown |= {
                name: f"{logs[-1][name]:.4f}" for name in self.names if name in logs[-1]
            }
            self._shown |= {name: f"{rate:.3g}" for name, rate in rates.items()}
            bar.set_postfix(self._shown, refresh=False)
        bar.update(steps)

    def report(self, step: int, skipped_steps: int) -> None:
        """What was skipped in the run; all processes must call it."""
        if skipped_steps:
            self.print(f"skipped {plural(skipped_steps, 'step')}: not finite")
        rows: Counter[tuple[str, str]] = Counter()
        for items in gather_object([[*self.skipped_rows.items()]]):
            for key, times in items:
                rows[key] += times
        if rows:
            entry = [(name, reason, times) for (name, reason), times in sorted(rows.items())]
            lines = [f"  {name}: {reason} ({plural(n, 'time')})" for name, reason, n in entry]
            self.print("\n".join([f"{plural(len(rows), 'sound')} could not be read:", *lines]))
            self.line({"step": step, "skipped_sounds": entry})
