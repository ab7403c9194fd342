"""MuLaNTrainer: trains a MuLaN on a dataset of clips and texts."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, random_split
from tqdm import tqdm

from musiclm_fast._checks import (
    NonFiniteError,
    check_choice,
    check_positive_int,
    check_probability,
    fail,
)
from musiclm_fast._files import atomic_folder
from musiclm_fast.models.configuration import CheckpointError
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_text,
    read_weights,
    write_weights,
)
from musiclm_fast.training.accelerated import Accelerator, gather_object
from musiclm_fast.training.batches import (
    random_state,
    set_random_state,
    training_loader,
)
from musiclm_fast.training.checkpoint import read_checkpoint, save_atomically
from musiclm_fast.training.data import collate
from musiclm_fast.training.grad_cache import cached_step
from musiclm_fast.training.optimizer import (
    SCHEDULES,
    WeightAverage,
    make_optimizer,
    schedule_factor,
)
from musiclm_fast.training.preparation import (
    accelerator_arguments,
    check_trackers,
    checkpoint_activations,
)
from musiclm_fast.training.preparation import compile_towers as _compile_towers
from musiclm_fast.training.progress import progress_bar
from musiclm_fast.training.run_folder import STATE_FILE, RunFolder
from musiclm_fast.training.stopping import stop_requests
from musiclm_fast.training.typed_config import plain_differences
from musiclm_fast.training.validation import SCORES, validate
from musiclm_fast.training.watch import (
    CollapseWatch,
    Readings,
    SkippedSteps,
    Speed,
    loss_without_learning,
)

Log = dict[str, float]
PRECISIONS = ("no", "bf16", "fp16")
STATE_FORMAT = 1
_AGREE_EVERY = 10  # steps between the processes' agreeing whether to stop
_SHOWN = ("loss", "valid_loss", "valid_recall@1")
_NAMED = 20  # sounds that could not be read and are named at once; the others at the end


class MuLaNTrainer(nn.Module):
    """Trains a MuLaN; with the reference's arguments alone as the reference does.

    Checkpoints are folders in ``results_folder``, see :mod:`musiclm_fast.training.run_folder`;
    ``MuLaN.from_pretrained("results/best")`` reads one. Random draws of the data are functions of
    the seed and the step, and the generators of the model's are saved: a run that is killed at any
    moment and resumed ends, on a CPU, with the weights of one that never was.

    With several processes (torchrun, accelerate launch) each takes its part of batches of
    ``processes * batch_size`` pairs, and the loss is that of the whole batch.

    Args:
        mulan: the model.
        dataset: rows of (clip, text), see :func:`musiclm_fast.training.data.collate`; one with a
            method ``draw(index, seed)`` is drawn by it.
        num_train_steps: optimizer steps; None is one per row of the dataset, as the reference.
        batch_size: pairs per step and process, at least 2.
        data_max_length: clips are cut to that many samples.
        folder: ignored, as in the reference.
        lr: learning rate.
        grad_accum_every: batches per optimizer step. Their negatives do not meet: for a batch
            larger than memory holds, use ``grad_cache_chunk``.
        betas: of the optimizer.
        max_grad_norm: gradients are clipped to this norm; None for no clipping.
        valid_frac: share of the dataset that is kept for validation.
        random_split_seed: seed of that split, of the order of batches and of the rows' draws.
        save_model_every: steps between checkpoints (and validations).
        results_folder: where checkpoints go.
        accelerate_kwargs: passed to accelerate's Accelerator.
        use_lion: Lion in place of Adam.
        force_clear_prev_results: True deletes what is in results_folder. Nothing else does, and
            nothing ever prompts. Without it and without ``resume``, training refuses to begin where
            another run's checkpoints are; False lets it, and replaces those of the same steps.
        optimizer: ``"adam"``, ``"adamw"`` or ``"lion"``; None is what ``use_lion`` says.
        weight_decay: of weight matrices; not of norms, biases, scales, temperatures, embeddings.
        schedule: of the learning rate after the warm-up: ``"constant"``, ``"linear"``,
            ``"cosine"``.
        warmup_steps: steps in which the learning rate rises linearly.
        final_lr: share of ``lr`` at which the schedule ends.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; None leaves it to accelerate.
        grad_cache_chunk: pairs that run through the towers together; the loss is that of the whole
            batch, in the memory of a chunk, see ``training.grad_cache``.
        activation_checkpointing: run each block's forward again in the backward pass, to save
            memory; masks and dropout are the same both times.
        compile_towers: ``torch.compile`` the towers' transformers.
        ema_decay: keep a moving average of the weights, which is what validation measures and
            ``model.safetensors`` holds.
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; so many in a row
            end the training.
        valid_dataset: for validation, in place of a part of the dataset.
        valid_every: steps between validations; None is with every checkpoint.
        valid_rows: most rows that a validation looks at.
        best_by: what makes a checkpoint the best: ``"valid_loss"`` or ``"valid_recall@1"`` (5, 10).
        keep_last: when a checkpoint is written, delete this run's older ones but for the newest
            ``keep_last`` and the best ``keep_best``. None deletes nothing.
        keep_best: see there.
        resume: go on from the latest checkpoint in results_folder, if there is one.
        num_workers: processes that read rows ahead.
        log_every: steps between lines of log.jsonl and calls of trackers.
        log_with: accelerate's trackers, such as ``"tensorboard"`` or ``"wandb"``.
        extra: further entries of the checkpoints' ``config.json``, such as ``clip_seconds``.

    Raises:
        ValueError: an argument out of range, a batch of one, a dataset smaller than a batch.
        CheckpointError: what is to be resumed is damaged or another run; the message names the
            options that differ.
    """

    steps: Tensor

    def __init__(
        self,
        mulan: MuLaN,
        dataset: Dataset[Any],
        *,
        num_train_steps: int | None = None,
        batch_size: int,
        data_max_length: int | None = None,
        folder: str | None = None,
        lr: float = 3e-4,
        grad_accum_every: int = 1,
        betas: tuple[float, float] = (0.9, 0.99),
        max_grad_norm: float | None = 0.5,
        valid_frac: float = 0.05,
        random_split_seed: int = 42,
        save_model_every: int = 1000,
        results_folder: str | Path = "./results",
        accelerate_kwargs: dict[str, Any] | None = None,
        use_lion: bool = False,
        force_clear_prev_results: bool | None = None,
        optimizer: str | None = None,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        final_lr: float = 0.0,
        mixed_precision: str | None = None,
        grad_cache_chunk: int | None = None,
        activation_checkpointing: bool = False,
        compile_towers: bool = False,
        ema_decay: float | None = None,
        max_skipped_steps: int = 10,
        valid_dataset: Dataset[Any] | None = None,
        valid_every: int | None = None,
        valid_rows: int = 1024,
        best_by: str = "valid_loss",
        keep_last: int | None = None,
        keep_best: int = 1,
        resume: bool = False,
        num_workers: int = 0,
        log_every: int = 1,
        log_with: Any = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("batch_size", batch_size)
        if batch_size < 2:
            fail("batch_size", batch_size, "at least 2: a contrast needs a negative")
        for name, value in (
            ("grad_accum_every", grad_accum_every), ("save_model_every", save_model_every),
            ("valid_rows", valid_rows), ("log_every", log_every),
        ):  # fmt: skip
            check_positive_int(name, value)
        for name, number in (
            ("num_train_steps", num_train_steps), ("grad_cache_chunk", grad_cache_chunk),
            ("valid_every", valid_every),
        ):  # fmt: skip
            if number is not None:
                check_positive_int(name, number)
        for name, count in (("warmup_steps", warmup_steps), ("num_workers", num_workers)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                fail(name, repr(count), "an integer of at least 0")
        check_probability("valid_frac", valid_frac)
        if not 0 <= final_lr <= 1:
            fail("final_lr", final_lr, "a share of lr, from 0 to 1")
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("best_by", best_by, SCORES)
        check_choice("mixed_precision", mixed_precision, (None, *PRECISIONS))
        if use_lion and optimizer not in (None, "lion"):
            fail("use_lion", True, f"False beside optimizer={optimizer!r}")
        optimizer = optimizer or ("lion" if use_lion else "adam")

        if not hasattr(dataset, "__len__"):
            fail(
                "dataset", type(dataset).__name__, "one with a length and rows by index", TypeError
            )
        rows = len(dataset)
        valid_share = valid_frac if valid_dataset is None else 0.0
        valid_part = rows - int((1 - valid_share) * rows) if valid_share > 0 else 0
        self.run = RunFolder(results_folder, keep_last, keep_best, best_by != "valid_loss")
        self.skipped_steps = SkippedSteps(max_skipped_steps)
        self.accelerator = Accelerator(
            **accelerator_arguments(
                mulan, mixed_precision, log_with, self.run.folder, accelerate_kwargs or {}
            )
        )
        check_trackers(self.accelerator, log_with)
        processes = self.accelerator.num_processes
        if rows - valid_part < batch_size * processes:
            shared = f" for each of {processes} processes" if processes > 1 else ""
            fail(
                "dataset",
                f"{rows - valid_part} rows for training ({rows} in all)",
                f"at least one batch of {batch_size}{shared}",
            )
        self.register_buffer("steps", torch.zeros(1))
        self.num_train_steps = rows if num_train_steps is None else num_train_steps
        self.batch_size, self.grad_accum_every = batch_size, grad_accum_every
        self.lr, self.max_grad_norm = lr, max_grad_norm
        self.data_max_length = data_max_length
        self.save_model_every = save_model_every
        self.valid_every = save_model_every if valid_every is None else valid_every
        self.valid_rows, self.best_by = valid_rows, best_by
        self.grad_cache_chunk, self.num_workers = grad_cache_chunk, num_workers
        self.schedule, self.warmup_steps, self.final_lr = schedule, warmup_steps, final_lr
        self.seed, self.log_every = random_split_seed, log_every
        self.extra = dict(extra or {})
        self._config = self._describe(mulan)

        self.ds: Dataset[Any] = dataset
        self.valid_ds: Dataset[Any] = dataset if valid_dataset is None else valid_dataset
        if valid_part:
            generator = torch.Generator().manual_seed(random_split_seed)
            self.ds, self.valid_ds = random_split(
                dataset, [rows - valid_part, valid_part], generator=generator
            )
            self.print(
                f"training with dataset of {rows - valid_part} samples and validating with "
                f"a random split of {valid_part} samples"
            )
        elif valid_dataset is None:
            self.print(f"training with shared training and valid dataset of {rows} samples")
        else:
            valid = len(valid_dataset)  # type: ignore[arg-type]
            self.print(f"training with dataset of {rows} samples and validating with {valid}")

        mulan.to(self.accelerator.device)
        if activation_checkpointing:
            checkpoint_activations(mulan)
        raw_optimizer = make_optimizer(
            mulan, optimizer, lr=lr, betas=betas, weight_decay=weight_decay
        )
        self._fused = bool(raw_optimizer.defaults.get("fused"))
        self.mulan, self.optim = self.accelerator.prepare(mulan, raw_optimizer)
        self.average: WeightAverage | None = None
        if ema_decay is not None:
            self.average = WeightAverage(self.unwrapped, ema_decay)
        if compile_towers:
            _compile_towers(self.unwrapped)
        if processes > 1:
            # Each process draws masks and dropout of its own.
            torch.manual_seed((torch.initial_seed() + self.accelerator.process_index) % 2**63)

        #: What determines the result, and so must not change where a run goes on.
        self.options: dict[str, Any] = {
            "batch_size": batch_size, "grad_accum_every": grad_accum_every, "optimizer": optimizer,
            "lr": lr, "betas": list(betas), "weight_decay": weight_decay, "schedule": schedule,
            "warmup_steps": warmup_steps, "final_lr": final_lr, "max_grad_norm": max_grad_norm,
            "data_max_length": data_max_length, "rows of the dataset": rows - valid_part,
            "random_split_seed": random_split_seed, "grad_cache_chunk": grad_cache_chunk,
            "mixed_precision": str(self.accelerator.mixed_precision), "ema_decay": ema_decay,
            "best_by": best_by, "processes": processes,
        }  # fmt: skip
        if schedule != "constant":
            self.options["num_train_steps"] = self.num_train_steps
        self.accelerator.init_trackers(
            "mulan",
            config={
                "num_train_steps": self.num_train_steps,
                "data_max_length": data_max_length,
                "learning_rate": lr,
            },
        )

        self.results_folder = self.run.folder
        if force_clear_prev_results and self.is_main and self.results_folder.exists():
            shutil.rmtree(self.results_folder)
        self.accelerator.wait_for_everyone()
        self.results_folder.mkdir(parents=True, exist_ok=True)
        self._may_begin = force_clear_prev_results is not None
        self._batches: Iterator[dict[str, Any]] | None = None
        self._saved_step = 0
        self._log_failed = False
        self._score: tuple[int, float | None] = 0, None  # the last validation's step and score
        self._readings = Readings()
        front_end = getattr(self.unwrapped.audio, "front_end", None)
        self._speed = Speed(getattr(front_end, "sample_hz", None), processes)
        self._shown: dict[str, str] = {}
        self._collapse = CollapseWatch(
            loss_without_learning(self.unwrapped, batch_size * processes), warmup_steps
        )
        #: (name, reason) of sounds that could not be read: how often
        self.skipped_rows: Counter[tuple[str, str]] = Counter()
        if resume:
            self._resume()

    # ---- what accelerate knows

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.accelerator.device

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
    def unwrapped(self) -> MuLaN:
        """The model itself, whatever accelerate put around it."""
        return cast(MuLaN, self.accelerator.unwrap_model(self.mulan))

    @property
    def evaluated(self) -> MuLaN:
        """The model that validation measures and checkpoints hold: the average, if there is one."""
        return self.unwrapped if self.average is None else cast(MuLaN, self.average.module)

    @property
    def collapsed_loss(self) -> float:
        """The loss of a model whose similarities are all equal."""
        return self._collapse.level

    @property
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return int(self.steps.item())

    def print(self, msg: str) -> None:
        """Print once, not once per process, above a progress bar."""
        if self.is_main:
            tqdm.write(msg)

    # ---- checkpoints

    def _describe(self, mulan: MuLaN) -> str:
        try:
            return config_text(mulan, self.extra)
        except TypeError as error:
            self.print(f"warning: checkpoints will not rebuild the model by themselves: {error}")
            return json.dumps({"library": "musiclm_fast", "model": None, "why": str(error)}) + "\n"

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, atomically; all processes must call it.

        Args:
            path: a folder of the three files; or, where it ends with ``.pt``, one file in the
                reference's format with weights, optimizer, step and random state.

        Raises:
            OSError: it could not be written; what was at ``path`` is as it was.
        """
        path = Path(path)
        if path.suffix == ".pt":
            package = {
                "model": self.accelerator.get_state_dict(self.mulan),
                "optim": self.optim.state_dict(),
                "steps": self.step,
                "rng": torch.get_rng_state(),
            }
            if self.is_main:
                save_atomically(path, package)
            return
        state = self._state()
        if self.is_main:
            with atomic_folder(path) as temporary:
                self._write(temporary, state)

    def _state(self) -> dict[str, Any]:
        own = random_state()
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        scaler = self.accelerator.scaler
        return {
            "format": STATE_FORMAT,
            "options": self.options,
            "step": self.step,
            "position": self.step * self.grad_accum_every,
            "optimizer": self.optim.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": gather_object([own]),
            "skipped_steps": [self.skipped_steps.total, self.skipped_steps.in_a_row],
            "losses": list(self._collapse.recent),
            "weights": None if self.average is None else self.unwrapped.state_dict(),
            "averaged_steps": 0 if self.average is None else int(self.average.n_averaged),
        }

    def _write(self, folder: Path, state: dict[str, Any]) -> None:
        (folder / CONFIG_FILE).write_text(self._config, encoding="utf-8")
        write_weights(self.evaluated, folder / WEIGHTS_FILE)
        scores = [[step, score] for step, score in self.run.scores.items()]
        save_atomically(folder / STATE_FILE, {**state, "scores": scores})

    def _checkpoint(self) -> None:
        state = self._state()
        step, score = self._score
        if self.is_main:
            self.run.save(
                self.step, score if step == self.step else None, lambda to: self._write(to, state)
            )
        self._saved_step = self.step
        self.accelerator.wait_for_everyone()

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint: a folder, or a file of :meth:`save` or of the reference (which
        lacks the step and random state).

        Raises:
            FileNotFoundError: there is no such file or folder.
            CheckpointError: it is damaged, no such checkpoint, or another architecture's.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path: no checkpoint at {path}")
        if path.is_dir():
            self._load_folder(path)
        else:
            self._load_file(path)
        self._batches = None
        if path.resolve().parent == self.results_folder.resolve():
            self._may_begin = True

    def _load_file(self, path: Path) -> None:
        package = read_checkpoint(path)
        if not {"model", "optim"} <= package.keys():
            raise CheckpointError(f"path: {path} has no 'model' and 'optim'")
        try:
            self.unwrapped.load_state_dict(package["model"])
            self._load_optimizer(package["optim"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"path: {path} holds another architecture: {error}") from error
        if self.average is not None:
            self.average.module.load_state_dict(package["model"])
            self.average.n_averaged.zero_()
        self.steps.fill_(package.get("steps", 0))
        if "rng" in package:
            torch.set_rng_state(package["rng"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        # Which kernel computes the step is this run's affair, not the checkpoint's.
        own = self.optim.param_groups
        if len(state["param_groups"]) != len(own):
            raise ValueError(f"the optimizer has {len(own)} groups of weights")
        kernels = ("fused", "foreach", "capturable", "differentiable")
        groups = [
            {**saved, **{name: group[name] for name in kernels if name in group}}
            for saved, group in zip(state["param_groups"], own, strict=True)
        ]
        self.optim.load_state_dict({**state, "param_groups": groups})

    def _load_folder(self, path: Path) -> dict[str, Any]:
        state = read_checkpoint(path / STATE_FILE)
        if state.get("format") != STATE_FORMAT:
            raise CheckpointError(
                f"checkpoint: {path / STATE_FILE} is not of format {STATE_FORMAT}"
            )
        try:
            read_weights(self.evaluated, path / WEIGHTS_FILE)
            if self.average is not None:
                weights = state["weights"] or self.average.module.state_dict()
                self.unwrapped.load_state_dict(weights)
                self.average.n_averaged.fill_(state["averaged_steps"])
            elif state["weights"] is not None:
                self.unwrapped.load_state_dict(state["weights"])
            self._load_optimizer(state["optimizer"])
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.steps.fill_(state["step"])
            self._saved_step = self.step
            self.skipped_steps.total, self.skipped_steps.in_a_row = state["skipped_steps"]
            self._collapse.recent = deque(state["losses"])
            states = state["random"]
            own = states[self.accelerator.process_index % len(states)]
            set_random_state(own)
            if "cuda" in own and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"], self.device)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint: {path} cannot be resumed: {error}") from error
        return state

    def _resume(self) -> None:
        if self.is_main:
            self.run.clean()
        self.accelerator.wait_for_everyone()
        self._may_begin = True
        path = self.run.latest()
        if path is None:
            if self.is_main:
                self.run.cut_log(0)
            return
        self._check_same_run(path)
        state = self._load_folder(path)
        self.run.adopt({int(step): float(score) for step, score in state["scores"]})
        if self.is_main:
            self.run.cut_log(self.step)
        self.print(f"resuming at step {self.step} of {self.num_train_steps} from {path}")

    def _check_same_run(self, path: Path) -> None:
        state = read_checkpoint(path / STATE_FILE)
        saved = state.get("options")
        saved = saved if isinstance(saved, dict) else {}
        differing = plain_differences(saved, self.options)
        config = path / CONFIG_FILE
        try:
            there = json.loads(config.read_text(encoding="utf-8")).get("model")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"checkpoint: {str(config)!r} is damaged ({error})") from error
        here = json.loads(self._config)["model"]
        if isinstance(there, dict) and isinstance(here, dict):
            differing += plain_differences(there, here)
        if differing:
            raise CheckpointError(
                f"results_folder: {str(path)!r} is of another run ({'; '.join(differing)}); choose "
                "another folder or the same options"
            )

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
        return training_loader(
            self.ds,
            batch_size=self.batch_size,
            seed=self.seed,
            start=self.step * self.grad_accum_every,
            processes=self.accelerator.num_processes,
            index=self.accelerator.process_index,
            collate=collate,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        skipped = batch.pop("skipped", ())
        for name, reason, *_ in skipped:
            self.skipped_rows[name, reason] += 1
            if self.skipped_rows[name, reason] == 1 and len(self.skipped_rows) <= _NAMED:
                tqdm.write(f"skipped {name}: {reason}")
        # Where lengths are known on the CPU, clips of similar lengths run together.
        batch = {
            name: value.to(self.device, non_blocking=True)
            if isinstance(value, Tensor) and name != "lengths"
            else value
            for name, value in batch.items()
        }
        if self.data_max_length is not None:
            batch["wavs"] = batch["wavs"][:, : self.data_max_length]
            if "lengths" in batch:
                batch["lengths"] = batch["lengths"].clamp(max=self.data_max_length)
        return batch

    def _backward(self, inputs: dict[str, Any]) -> Tensor:
        # The loss, a detached scalar, with its gradients added to the parameters'.
        share = 1 / self.grad_accum_every
        if self.grad_cache_chunk is None:
            loss = self.mulan(**inputs) * share
            self.accelerator.backward(loss)
            return cast(Tensor, loss.detach())
        loss = cached_step(
            self.mulan,
            **inputs,
            chunk_size=self.grad_cache_chunk,
            backward=lambda whole: self.accelerator.backward(whole * share),
        )
        return loss * share

    def _optimizer_step(self) -> Tensor:
        # One optimizer step; (3,): loss, gradient norm, whether the step was skipped.
        if self._batches is None:
            self._batches = self._loader()
        self.mulan.train()
        factor = self._schedule_factor(self.step)
        for group in self.optim.param_groups:
            group["lr"] = self.lr * factor
        total = torch.zeros((), device=self.device)
        finite = True
        for part in range(self.grad_accum_every):
            batch = next(self._batches)
            inputs = self._inputs(batch)
            self._speed.add(inputs)
            if not finite:
                continue  # drawn all the same: the position stays a function of the step
            last = part == self.grad_accum_every - 1
            try:
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.mulan):
                    total = total + self._backward(inputs)
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
        if self.average is not None:
            self.average.update_parameters(self.unwrapped)
        self.steps += 1
        self._speed.step()
        return torch.stack([total.float(), norm.float(), skipped.float()])

    def _clip(self) -> Tensor:
        parameters = [p for p in self.mulan.parameters() if p.grad is not None]
        if self.max_grad_norm is not None:
            return cast(Tensor, self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm))
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

    def _schedule_factor(self, step: int) -> float:
        return schedule_factor(
            step, kind=self.schedule, warmup_steps=self.warmup_steps,
            total_steps=self.num_train_steps, final=self.final_lr,
        )  # fmt: skip

    def _advance(self, wait: bool) -> list[Log]:
        # A step, and the logs of those steps whose numbers are known by now.
        values = self._optimizer_step()
        step = self.step
        validates, saves = step % self.valid_every == 0, step % self.save_model_every == 0
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
        if warning := self._collapse.note(step, loss):
            self.print(f"warning: {warning}")
            self._log_line({"step": step, "warning": warning})
        if step % self.log_every == 0:
            entry = {
                "train_loss": loss,
                "grad_norm": norm,
                "learning_rate": self.lr * self._schedule_factor(step - 1),
                "skipped_steps": self.skipped_steps.total,
                **self._speed.rates(),
            }
            self.accelerator.log(entry, step=step)
            self._log_line({"step": step, **entry})
        return {"loss": loss}

    def _validated(self) -> Log:
        found = self.validate()
        self._score = self.step, found.get(self.best_by)
        self.accelerator.log(found, step=self.step)
        self._log_line({"step": self.step, **found})
        return found

    def _log_line(self, entry: dict[str, Any]) -> None:
        if not self.is_main:
            return
        try:
            self.run.log(entry)
        except OSError as error:  # a full disk: what was learned is worth more than its log
            if not self._log_failed:
                self.print(f"warning: {self.run.folder}: the log cannot be written ({error})")
            self._log_failed = True

    def train_step(self) -> Log:
        """One optimizer step.

        Returns:
            ``{"loss": ...}``, the mean over the accumulated batches; at a step that validates also
            what :meth:`validate` returns.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        return self._advance(wait=True)[-1]

    def validate(self) -> Log:
        """Loss and recall over the validation set in evaluation mode; all processes must call it.

        Returns:
            See :func:`musiclm_fast.training.validation.validate`.
        """
        return validate(
            self.evaluated, self.valid_ds, self._inputs, self.accelerator, rows=self.valid_rows,
            batch_size=self.batch_size, seed=self.seed, num_workers=self.num_workers,
        )  # fmt: skip

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
        bar = progress_bar(
            total=self.num_train_steps, initial=self.step, unit="step",
            disable=not self.is_local_main,
        )  # fmt: skip
        stop = False
        with bar, stop_requests() as stopped:
            while self.step < self.num_train_steps and not stop:
                logs = self._advance(wait=self.step + 1 >= self.num_train_steps)
                stop = self._agree(stopped())
                self._show(bar, logs, log_fn)
            if stop:
                self._show(bar, [self._note(*n) for n in self._readings.take(True)], log_fn, 0)
            if self._saved_step != self.step:
                if not stop and self._score[0] != self.step:
                    self._validated()
                self._checkpoint()
        self._report()
        if stop:
            raise KeyboardInterrupt
        self.print("training complete")

    def _show(
        self, bar: Any, logs: list[Log], log_fn: Callable[[Log], Any] | None, steps: int = 1
    ) -> None:
        for log in logs:
            if log_fn is not None:
                log_fn(log)
        if logs and self.is_local_main:
            self._shown |= {name: f"{logs[-1][name]:.4f}" for name in _SHOWN if name in logs[-1]}
            self._shown |= {name: f"{rate:.3g}" for name, rate in self._speed.rates().items()}
            bar.set_postfix(self._shown, refresh=False)
        bar.update(steps)

    def _agree(self, stop: bool) -> bool:
        # Processes may learn of a request one step apart, and must stop at the same one.
        if not self.is_distributed:
            return stop
        if self.step % _AGREE_EVERY:
            return False
        flag = torch.tensor([float(stop)], device=self.device)
        return bool(cast(Tensor, self.accelerator.reduce(flag)).item())

    def _report(self) -> None:
        if self.skipped_steps.total:
            self.print(f"{self.skipped_steps.total} steps were skipped: not finite")
        everyone = gather_object([[*self.skipped_rows.items()]])
        rows: Counter[tuple[str, str]] = Counter()
        for items in everyone:
            for key, times in items:
                rows[key] += times
        if rows:
            lines = [
                f"  {name}: {reason} ({n} times)" for (name, reason), n in sorted(rows.items())
            ]
            self.print("\n".join([f"{len(rows)} sounds could not be read:", *lines]))
            entry = [[name, reason, times] for (name, reason), times in sorted(rows.items())]
            self._log_line({"step": self.step, "skipped_sounds": entry})
