"""The training engine: one loop for MuLaN and for the stages of AudioLM.

A trainer is an :class:`Engine` with a task: it says how rows become a batch, what the loss is, how
it is validated, and what a checkpoint holds. Everything else is written here once: accumulation,
precision, clipping, the schedule, skipped steps, checkpoints, resuming, random states, signals,
logs, trackers and progress.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, random_split

from musiclm_fast._checks import NonFiniteError, fail
from musiclm_fast._signals import stop_requests
from musiclm_fast._wording import plural
from musiclm_fast.datasets.sampling import training_loader
from musiclm_fast.training.accelerated import Accelerator
from musiclm_fast.training.checkpoints import Checkpoints
from musiclm_fast.training.monitor import Readings, SkippedSteps, Speed
from musiclm_fast.training.optimizer import make_optimizer, schedule_factor
from musiclm_fast.training.options import RunOptions
from musiclm_fast.training.preparation import accelerator_arguments, check_trackers
from musiclm_fast.training.run_folder import Form, RunFolder
from musiclm_fast.training.run_log import Log, RunLog

_AGREE_EVERY = 10  # steps between the processes' agreeing whether to stop


class Engine(Checkpoints):
    """Trains a module; the subclasses, one for each task, say what is special about it.

    Random draws of the data are functions of the seed and the step, and all generators are saved:
    a run that is killed at any moment and resumed ends, on a CPU, with the weights of one that
    never was. With several processes each takes its part of batches of
    ``processes * batch_size`` rows.

    Args:
        module: what is trained.
        dataset: rows by index; one with a method ``draw(index, seed)`` is drawn by it.
        options: of the run.
        valid_dataset: for validation, in place of a share of the dataset.
        accelerate_kwargs: passed to accelerate's Accelerator.
        force_clear_prev_results: True deletes what is in the results folder. Without it and
            without ``resume``, training refuses to begin where another run's checkpoints are;
            False lets it, and replaces those of the same steps.
        resume: go on from the latest checkpoint in the results folder, if there is one.
        num_workers: processes that read rows ahead.
        uses_all_parameters: whether every step has a gradient for every parameter.
        fused: one optimizer kernel for all parameters.

    Raises:
        ValueError: a dataset smaller than a batch, a tracker that is not installed.
        CheckpointError: what is to be resumed is damaged or another run; the message names the
            options that differ.
    """

    form: Form  # of the checkpoints
    task: str  # its name, for trackers and the progress bar
    sample_hz: int | None = None  # of the clips, where it is known
    shown: tuple[str, ...] = ("loss", "valid_loss")  # on the progress bar

    def __init__(
        self,
        module: nn.Module,
        dataset: Dataset[Any],
        options: RunOptions,
        *,
        valid_dataset: Dataset[Any] | None = None,
        accelerate_kwargs: dict[str, Any] | None = None,
        force_clear_prev_results: bool | None = None,
        resume: bool = False,
        num_workers: int = 0,
        uses_all_parameters: bool = True,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
            fail("num_workers", repr(num_workers), "an integer of at least 0")
        training, validation = options.training, options.validation
        self.options = options
        self.run = RunFolder(
            training.output, self.form, training.keep_last, training.keep_best,
            validation.best_by != "valid_loss",
        )  # fmt: skip
        self.results_folder = self.run.folder
        log_with = list(training.log_with) or None
        check_trackers(training.log_with)
        self.accelerator = Accelerator(
            **accelerator_arguments(
                training.precision, log_with, self.run.folder, accelerate_kwargs or {},
                uses_all_parameters,
            )
        )  # fmt: skip
        self.log = RunLog(self.run, self.accelerator, self.task, self.shown)
        self.register_buffer("steps", torch.zeros(1))
        self.num_train_steps = training.steps
        self.batch_size, self.grad_accum_every = training.batch_size, training.accumulate
        self.lr, self.seed = options.optimizer.learning_rate, training.seed
        self.num_workers = num_workers
        self.valid_every = validation.every or training.save_every
        self.ds, self.valid_ds = self.split(dataset, valid_dataset)

        module.to(self.accelerator.device)
        self.prepare_module(module)
        trained = self.trained(module)
        #: The parameters that the optimizer knows.
        self.trained_parameters = [p for _, p in trained if p.requires_grad]
        optimizer = make_optimizer(
            module, options.optimizer, parameters=trained,
            fused=fused or self.accelerator.device.type == "cuda",
        )  # fmt: skip
        self._fused = bool(optimizer.defaults.get("fused"))
        self.module, self.optim = self.accelerator.prepare(module, optimizer)
        self.prepared()
        processes = self.accelerator.num_processes
        if processes > 1:
            # Each process draws masks and dropout of its own.
            torch.manual_seed((torch.initial_seed() + self.accelerator.process_index) % 2**63)
        self.accelerator.init_trackers(
            self.task, config={"num_train_steps": self.num_train_steps, "learning_rate": self.lr}
        )
        if force_clear_prev_results and self.is_main and self.results_folder.exists():
            shutil.rmtree(self.results_folder)
        self.accelerator.wait_for_everyone()
        self.results_folder.mkdir(parents=True, exist_ok=True)
        self._may_begin = force_clear_prev_results is not None
        self._batches: Iterator[dict[str, Any]] | None = None
        self._saved_step = 0
        self._score: tuple[int, float | None] = 0, None  # the last validation's step and score
        self.last_validation: Log = {}  # what it found
        self.seconds = 0.0  # spent in steps, over all sittings
        self._readings = Readings()
        self._speed = Speed(self.sample_hz, processes)
        self.skipped_steps = SkippedSteps(training.max_skipped_steps)
        if resume:
            self._resume()

    def split(
        self, dataset: Dataset[Any], valid_dataset: Dataset[Any] | None
    ) -> tuple[Dataset[Any], Dataset[Any]]:
        """What is trained on, and what is validated on."""
        if not hasattr(dataset, "__len__"):
            wanted = "one with a length and rows by index"
            fail("dataset", type(dataset).__name__, wanted, TypeError)
        rows, share = len(dataset), self.options.validation.share
        valid = rows - int((1 - share) * rows) if share > 0 and valid_dataset is None else 0
        processes = self.accelerator.num_processes
        if rows - valid < self.batch_size * processes:
            each = f" for each of {plural(processes, 'process', 'processes')}"
            shared = each if processes > 1 else ""
            found = f"{plural(rows - valid, 'row')} for training ({rows} in all)"
            fail("dataset", found, f"at least one batch of {self.batch_size}{shared}")
        if valid_dataset is not None:
            count = len(valid_dataset)  # type: ignore[arg-type]
            self.print(
                f"training with dataset of {plural(rows, 'sample')} and validating with {count}"
            )
            return dataset, valid_dataset
        if not valid:
            self.print(
                f"training with shared training and valid dataset of {plural(rows, 'sample')}"
            )
            return dataset, dataset
        generator = torch.Generator().manual_seed(self.seed)
        parts = random_split(dataset, [rows - valid, valid], generator=generator)
        self.print(
            f"training with dataset of {plural(rows - valid, 'sample')} and validating with "
            f"randomly split {plural(valid, 'sample')}"
        )
        return parts[0], parts[1]

    # ---- the task

    def prepare_module(self, module: nn.Module) -> None:
        """Change the module, which lies on its device, before the optimizer is made."""

    def prepared(self) -> None:
        """Change the module after accelerate has prepared it."""

    def trained(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The named parameters that are trained."""
        return [*module.named_parameters()]

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A batch of rows, the keyword arguments of the module."""
        raise NotImplementedError

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device."""
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def size_of(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Clips and samples of a batch."""
        raise NotImplementedError

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of a batch, a scalar."""
        raise NotImplementedError

    def backward(self, inputs: dict[str, Any], share: float) -> Tensor:
        """Add the gradients of ``share`` times the loss; returns that, detached."""
        loss = self.loss(inputs) * share
        self.accelerator.backward(loss)
        return loss.detach()

    def after_step(self) -> None:
        """What follows an optimizer step."""

    def warning(self, step: int, loss: float) -> str | None:
        """What is wrong with a step's loss, if anything."""
        return None

    def measure(self) -> Log:
        """Validate in evaluation mode; all processes call it."""
        raise NotImplementedError

    # ---- what accelerate knows

    @property
    def is_distributed(self) -> bool:
        """Whether several processes train."""
        return self.accelerator.num_processes > 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the first of all."""
        return self.accelerator.is_main_process

    @property
    def is_local_main(self) -> bool:
        """Whether this process is the first of its machine."""
        return self.accelerator.is_local_main_process

    @property
    def unwrapped(self) -> Any:
        """The module itself, whatever accelerate put around it."""
        return self.accelerator.unwrap_model(self.module)

    def print(self, msg: str) -> None:
        """Print once, not once per process, above a progress bar."""
        self.log.print(msg)

    # ---- steps

    def _loader(self) -> Iterator[dict[str, Any]]:
        if not self._may_begin and (there := self.run.latest()) is not None:
            fail(
                "results_folder",
                f"{str(self.results_folder)!r} with the checkpoints of an earlier run, the latest "
                f"{there.name}",
                "resume=True to go on with it, force_clear_prev_results=True to delete it, or "
                "another folder",
            )
        self._may_begin = True
        return self.batches(self.step * self.grad_accum_every)

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """This process's batches without end, from batch ``start`` on."""
        return training_loader(
            self.ds, batch_size=self.batch_size, seed=self.seed, start=start,
            processes=self.accelerator.num_processes, index=self.accelerator.process_index,
            collate=self.collate, num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def _optimizer_step(self) -> Tensor:
        # One optimizer step; (3,): loss, gradient norm, whether the step was skipped.
        if self._batches is None:
            self._batches = self._loader()
        self.module.train()
        rate = self.lr * schedule_factor(self.step, self.options)
        for group in self.optim.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        finite = True
        for part in range(self.grad_accum_every):
            inputs = self.inputs(next(self._batches))
            self._speed.add(*self.size_of(inputs))
            if not finite:
                continue  # drawn all the same: the position stays a function of the step
            last = part == self.grad_accum_every - 1
            try:
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                    total = total + self.backward(inputs, 1 / self.grad_accum_every)
            except NonFiniteError:
                if self.is_distributed:
                    raise  # the other processes wait for this one's part of the loss
                finite = False
        if finite:
            norm = self._clip()
            skipped = ~(total.isfinite() & norm.isfinite())
            self._update(skipped)
        else:
            norm, total, skipped = total * torch.nan, total * torch.nan, total.new_ones(())
        self.optim.zero_grad()
        self.after_step()
        self.steps += 1
        self._speed.step()
        return torch.stack([total.float(), norm.float(), skipped.float()])

    def _clip(self) -> Tensor:
        parameters = [p for p in self.trained_parameters if p.grad is not None]
        most = self.options.optimizer.max_grad_norm
        if most is not None:
            return cast(Tensor, self.accelerator.clip_grad_norm_(parameters, most))
        self.accelerator.unscale_gradients()
        return torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])

    def _update(self, skipped: Tensor) -> None:
        if self.accelerator.scaler is not None:
            self.optim.step()  # the scaler skips by itself
        elif self._fused:
            # The kernel reads the flag on the device, so that nobody waits for it.
            self.optim.optimizer.found_inf = skipped.float()
            self.optim.step()
        elif not bool(skipped):
            self.optim.step()

    def _advance(self, wait: bool) -> list[Log]:
        # A step, and the logs of those steps whose numbers are known by now.
        began = time.monotonic()
        values = self._optimizer_step()
        self.seconds += time.monotonic() - began
        step = self.step
        validates = step % self.valid_every == 0
        saves = step % self.options.training.save_every == 0
        self._readings.put(step, values)
        ready = self._readings.take(wait or validates or saves)
        logs = [self._note(*numbers) for numbers in ready]
        if validates:
            logs[-1].update(self._validated())
        if saves:
            self._checkpoint()
        if validates or saves:
            self._speed.pause()
        return logs

    def _note(self, step: int, values: Sequence[float]) -> Log:
        loss, norm, skipped = values
        if skipped:
            self.print(f"step {step} skipped: loss {loss}, gradient norm {norm}")
        self.skipped_steps.note(step, bool(skipped))
        if warning := self.warning(step, loss):
            self.print(f"warning: {warning}")
            self.log.line({"step": step, "warning": warning})
        if step % self.options.training.log_every == 0:
            rate = self.lr * schedule_factor(step - 1, self.options)
            entry = {"train_loss": loss, "grad_norm": norm, "learning_rate": rate}
            entry["skipped_steps"] = self.skipped_steps.total
            self.log.numbers(step, {**entry, **self._speed.rates()})
        return {"loss": loss}

    def _validated(self) -> Log:
        found = self.last_validation = self.measure()
        self._score = self.step, found.get(self.options.validation.best_by)
        self.log.numbers(self.step, found)
        return found

    def train_step(self) -> Log:
        """One optimizer step.

        Returns:
            ``{"loss": ...}``, the mean over the accumulated batches; at a step that validates also
            what the validation found.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        return self._advance(wait=True)[-1]

    def train(self, log_fn: Callable[[Log], Any] | None = None) -> None:  # type: ignore[override]
        """Train to ``num_train_steps`` with a progress bar, and write a checkpoint at the end.

        Args:
            log_fn: is called with each step's log, in order; on a GPU a few steps late, so that
                nothing waits.

        Raises:
            KeyboardInterrupt: Ctrl-C (or SIGTERM) came; the step was finished and the run saved.
            FloatingPointError: too many steps in a row were skipped.
            OSError: a checkpoint could not be written; earlier ones are as they were.
        """
        bar = self.log.bar(self.num_train_steps, self.step)
        began, stop = self.step, False
        with bar, stop_requests() as stopped:
            while self.step < self.num_train_steps and not stop:
                logs = self._advance(wait=self.step + 1 >= self.num_train_steps)
                stop = self._agree(stopped())
                self.log.show(bar, logs, self._speed.rates(), log_fn)
            if stop:
                rest = [self._note(*numbers) for numbers in self._readings.take(True)]
                self.log.show(bar, rest, self._speed.rates(), log_fn, 0)
            scored = self._score[0] == self.step
            if not (stop or scored or self.step == began):
                self._validated()
                self._checkpoint()  # again, with its score, if it is there already
            elif self._saved_step != self.step:
                self._checkpoint()
        self.log.report(self.step, self.skipped_steps.total)
        if stop:
            raise KeyboardInterrupt
        self.print("training complete")

    def _agree(self, stop: bool) -> bool:
        # Processes may learn of a request one step apart, and must stop at the same one.
        if not self.is_distributed:
            return stop
        if self.step % _AGREE_EVERY:
            return False
        flag = torch.tensor([float(stop)], device=self.device)
        return bool(cast(Tensor, self.accelerator.reduce(flag)).item())
