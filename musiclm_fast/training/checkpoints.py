"""What an engine's checkpoints hold, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast._config import plain_differences
from musiclm_fast._wording import plural
from musiclm_fast.training.accelerated import Accelerator, gather_object
from musiclm_fast.training.monitor import SkippedSteps
from musiclm_fast.training.options import RunOptions
from musiclm_fast.training.random_state import random_state, set_random_state
from musiclm_fast.training.run_folder import RunFolder
from musiclm_fast.training.run_log import RunLog

STATE_FORMAT = 1


class Checkpoints(nn.Module):
    """The half of the engine that saves and resumes; a task says where its weights are."""

    options: RunOptions
    run: RunFolder
    accelerator: Accelerator
    log: RunLog
    optim: Any
    ds: Any
    steps: Tensor
    grad_accum_every: int
    num_train_steps: int
    skipped_steps: SkippedSteps
    seconds: float  # spent in steps, over all sittings
    advice = "choose another folder or the same options"  # where the folder holds another run
    _batches: Iterator[dict[str, Any]] | None
    _may_begin: bool
    _saved_step: int
    _score: tuple[int, float | None]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.accelerator.device

    @property
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return int(self.steps.item())

    # ---- the task

    def facts(self) -> dict[str, Any]:
        """Further options that determine the result, by name."""
        return {}

    def architecture(self) -> Any:
        """What is trained, as plain values; None where nothing says."""
        return None

    def saved_architecture(self, path: Path, state: dict[str, Any]) -> Any:
        """The architecture of a checkpoint."""
        return None

    def task_state(self) -> dict[str, Any]:
        """What the task adds to the state of a checkpoint."""
        return {}

    def load_task_state(self, path: Path, state: dict[str, Any]) -> None:
        """Put weights and the task's state back."""
        raise NotImplementedError

    def write_checkpoint(self, path: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint: fill the folder ``path``, or write the file, as the form says."""
        raise NotImplementedError

    def state_of(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint that :meth:`write_checkpoint` wrote."""
        raise NotImplementedError

    # ---- saving and resuming

    @property
    def saved_options(self) -> dict[str, Any]:
        """What determines the result, and so must not change where a run goes on."""
        options = self.options.arguments(may_change=False)
        if self.options.schedule.name == "constant":
            del options["num_train_steps"]
        del options["valid_frac"]  # the number of rows says more
        if not options["decay_all_matrices"]:  # which runs of earlier versions do not name
            del options["decay_all_matrices"]
        options["betas"] = list(options["betas"])
        options["mixed_precision"] = str(self.accelerator.mixed_precision)
        options["rows of the dataset"] = len(self.ds)  # type: ignore[arg-type]
        options["processes"] = self.accelerator.num_processes
        return {**options, **self.facts()}

    def state(self) -> dict[str, Any]:
        """All that a run goes on from, but for the weights; all processes must call it."""
        scaler = self.accelerator.scaler
        return {
            "format": STATE_FORMAT,
            "options": self.saved_options,
            "step": self.step,
            "position": self.step * self.grad_accum_every,
            "optimizer": self.optim.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": gather_object([random_state(self.device)]),
            "seconds": self.seconds,
            "skipped_steps": [self.skipped_steps.total, self.skipped_steps.in_a_row],
            "scores": [[step, score] for step, score in self.run.scores.items()],
            **self.task_state(),
        }

    def _checkpoint(self) -> None:
        state = self.state()
        step, score = self._score

        def write(path: Path) -> None:
            state["scores"] = [[*each] for each in self.run.scores.items()]
            self.write_checkpoint(path, state)

        if self.accelerator.is_main_process:
            self.run.save(self.step, score if step == self.step else None, write)
        self._saved_step = self.step
        self.accelerator.wait_for_everyone()

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Go on from a state of :meth:`state`.

        Raises:
            CheckpointError: it lacks something, or is of another architecture.
        """
        if state.get("format") != STATE_FORMAT:
            raise CheckpointError(f"checkpoint: {path} is not of format {STATE_FORMAT}")
        try:
            self.load_task_state(path, state)
            self.load_optimizer(state["optimizer"])
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.at_step(state["step"])
            self._saved_step = self.step
            self.seconds = state.get("seconds", 0.0)
            self.skipped_steps.total, self.skipped_steps.in_a_row = state["skipped_steps"]
            states = state["random"]
            own = states[self.accelerator.process_index % len(states)]
            set_random_state(own, self.device)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint: {path} cannot be resumed: {error}") from error

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Put the optimizer's state back; which kernel computes the step is this run's affair."""
        own = self.optim.param_groups
        if len(state["param_groups"]) != len(own):
            raise ValueError(f"the optimizer has {plural(len(own), 'group')} of weights")
        kernels = ("fused", "foreach", "capturable", "differentiable")
        groups = [
            {**saved, **{name: group[name] for name in kernels if name in group}}
            for saved, group in zip(state["param_groups"], own, strict=True)
        ]
        self.optim.load_state_dict({**state, "param_groups": groups})

    def at_step(self, step: int) -> None:
        """Say how many steps are done: the data and the schedule go on from there."""
        self.steps.fill_(step)
        self._batches = None

    def loaded(self, path: Path) -> None:
        """Note that ``path`` was loaded: a checkpoint of this folder is this run's."""
        if path.resolve().parent == self.run.folder.resolve():
            self._may_begin = True

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            self.run.clean()
        self.accelerator.wait_for_everyone()
        self._may_begin = True
        path = self.run.latest()
        if path is None:
            if self.accelerator.is_main_process:
                self.run.cut_log(0)
            return
        state = self.state_of(path)
        self._check_same_run(path, state)
        self.restore(path, state)
        self.run.adopt({int(step): float(score) for step, score in state["scores"]})
        if self.accelerator.is_main_process:
            self.run.cut_log(self.step)
        self.log.print(f"resuming at step {self.step} of {self.num_train_steps} from {path}")

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        saved = state.get("options")
        differing = plain_differences(saved if isinstance(saved, dict) else {}, self.saved_options)
        there, here = self.saved_architecture(path, state), self.architecture()
        if isinstance(there, dict) and isinstance(here, dict):
            differing += plain_differences(there, here)
        if differing:
            raise CheckpointError(
                f"results_folder: {str(path)!r} is of another run ({'; '.join(differing)}); "
                f"{self.advice}"
            )
