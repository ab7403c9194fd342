"""MuLaNTrainer: trains a MuLaN on a dataset of clips and texts."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from musiclm_fast._checkpoint import CheckpointError, read_checkpoint, save_atomically
from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast._files import atomic_folder
from musiclm_fast.datasets.collation import collate
from musiclm_fast.models.configuration import with_current_names
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_text,
    read_weights,
    write_weights,
)
from musiclm_fast.training.engine import Engine
from musiclm_fast.training.grad_cache import cached_step
from musiclm_fast.training.monitor import CollapseMonitor, loss_without_learning
from musiclm_fast.training.mulan_config import UPSTREAM, MuLaNTrainingConfig
from musiclm_fast.training.optimizer import WeightAverage
from musiclm_fast.training.options import RunOptions
from musiclm_fast.training.preparation import (
    checkpoint_activations,
    compile_towers,
    uses_all_parameters,
)
from musiclm_fast.training.run_folder import MULAN, STATE_FILE
from musiclm_fast.training.run_log import Log
from musiclm_fast.training.validation import validate


class MuLaNTrainer(Engine):
    """Trains a MuLaN; with upstream's arguments alone as upstream does.

    Checkpoints are folders in ``results_folder``, see :mod:`musiclm_fast.training.run_folder`;
    ``MuLaN.from_pretrained("results/best")`` reads one. See :class:`.engine.Engine` for resuming
    and for several processes, with which the loss is that of the whole batch.

    Args:
        mulan: the model.
        dataset: rows of (clip, text), see :func:`.collation.collate`; one with a method
            ``draw(index, seed)`` is drawn by it.
        data_max_length: clips are cut to that many samples.
        folder: ignored, as in upstream.
        accelerate_kwargs: passed to accelerate's Accelerator.
        use_lion: Lion in place of Adam.
        force_clear_prev_results: True deletes what is in results_folder; nothing ever prompts.
            Without it and without ``resume``, training refuses to begin where another run's
            checkpoints are; False lets it, and replaces those of the same steps.
        valid_dataset: for validation, in place of a share of the dataset.
        resume: go on from the latest checkpoint in results_folder, if there is one.
        num_workers: processes that read rows ahead.
        extra: further entries of the checkpoints' ``config.json``, such as ``clip_seconds``.
        options: the run's options as a whole, in place of the arguments below.
        **arguments: fields of the options. ``num_train_steps`` is one step per row of the dataset
            if it is not given, as in upstream::

    {arguments}

    Raises:
        ValueError: an argument out of range, a batch of one, a dataset smaller than a batch.
        CheckpointError: what is to be resumed is damaged or another run; the message names the
            options that differ.
    """

    form, task = MULAN, "mulan"
    shown: tuple[str, ...] = ("loss", "valid_loss", "valid_recall@1")

    def __init__(
        self,
        mulan: MuLaN,
        dataset: Dataset[Any],
        *,
        data_max_length: int | None = None,
        folder: str | None = None,
        accelerate_kwargs: dict[str, Any] | None = None,
        use_lion: bool = False,
        force_clear_prev_results: bool | None = None,
        valid_dataset: Dataset[Any] | None = None,
        resume: bool = False,
        num_workers: int = 0,
        extra: dict[str, Any] | None = None,
        options: RunOptions | None = None,
        **arguments: Any,
    ) -> None:
        if options is None:
            options = _from_arguments(dataset, use_lion, arguments)
        elif arguments:
            fail("options", "given", f"None beside {', '.join(arguments)}")
        if data_max_length is not None:
            check_positive_int("data_max_length", data_max_length)
        self.data_max_length = data_max_length
        self.training_options = cast(MuLaNTrainingConfig, options.training)
        self.sample_hz = getattr(getattr(mulan.audio, "front_end", None), "sample_hz", None)
        self.average: WeightAverage | None = None
        self._config, undescribed = _describe(mulan, extra or {})
        # Its level is known with the number of processes.
        self._collapse = CollapseMonitor(0.0, options.schedule.warmup_steps)
        super().__init__(
            mulan, dataset, options, valid_dataset=valid_dataset,
            accelerate_kwargs=accelerate_kwargs, num_workers=num_workers, resume=resume,
            force_clear_prev_results=force_clear_prev_results,
            uses_all_parameters=uses_all_parameters(mulan),
        )  # fmt: skip
        if undescribed:
            self.print(
                f"warning: checkpoints will not rebuild the model by themselves: {undescribed}"
            )

    @property
    def mulan(self) -> Any:
        """The model, with what accelerate put around it."""
        return self.module

    @property
    def evaluated(self) -> MuLaN:
        """The model that validation measures and checkpoints hold: the average, if there is one."""
        model = self.unwrapped if self.average is None else self.average.module
        return cast(MuLaN, model)

    @property
    def collapsed_loss(self) -> float:
        """The loss of a model whose similarities are all equal."""
        return self._collapse.level

    # ---- the task

    def prepare_module(self, module: nn.Module) -> None:
        """Activation checkpointing."""
        if self.training_options.activation_checkpointing:
            checkpoint_activations(cast(MuLaN, module))

    def prepared(self) -> None:
        """The average of the weights, compilation, and the level of a collapsed loss."""
        pairs = self.batch_size * self.accelerator.num_processes
        self._collapse.level = loss_without_learning(self.unwrapped, pairs)
        if self.training_options.ema_decay is not None:
            self.average = WeightAverage(self.unwrapped, self.training_options.ema_decay)
        if self.training_options.compile:
            compile_towers(self.unwrapped)

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A batch of rows of clips and texts."""
        return collate(rows)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device, cut to ``data_max_length``."""
        self.log.skipped(batch.pop("skipped", ()))
        # Where lengths are known on the CPU, clips of similar lengths run together.
        lengths = batch.pop("lengths", None)
        batch = super().inputs(batch)
        if self.data_max_length is not None:
            batch["wavs"] = batch["wavs"][:, : self.data_max_length]
            lengths = None if lengths is None else lengths.clamp(max=self.data_max_length)
        return batch if lengths is None else {**batch, "lengths": lengths}

    def size_of(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Clips and samples of a batch."""
        wavs, lengths = inputs["wavs"], inputs.get("lengths")
        return len(wavs), wavs.numel() if lengths is None else int(lengths.sum())

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The contrastive loss."""
        return cast(Tensor, self.module(**inputs))

    def backward(self, inputs: dict[str, Any], share: float) -> Tensor:
        """Add the gradients of the loss, by gradient caching where chunks are asked for."""
        chunk = self.training_options.grad_cache_chunk
        if chunk is None:
            return super().backward(inputs, share)
        return share * cached_step(
            self.module, **inputs, chunk_size=chunk,
            backward=lambda whole: self.accelerator.backward(whole * share),
            autocast=self.accelerator.autocast,
        )  # fmt: skip

    def after_step(self) -> None:
        """Move the average of the weights."""
        if self.average is not None:
            self.average.update_parameters(self.unwrapped)

    def warning(self, step: int, loss: float) -> str | None:
        """Whether the model has collapsed."""
        return self._collapse.note(step, loss)

    def measure(self) -> Log:
        """See :meth:`validate`."""
        return self.validate()

    def validate(self) -> Log:
        """Loss and recall over the validation set in evaluation mode; all processes must call it.

        Returns:
            See :func:`musiclm_fast.training.validation.validate`.
        """
        return validate(
            self.evaluated, self.valid_ds, self.inputs, self.accelerator,
            rows=self.options.validation.rows, batch_size=self.batch_size, seed=self.seed,
            num_workers=self.num_workers,
        )  # fmt: skip

    # ---- checkpoints

    def facts(self) -> dict[str, Any]:
        """Options beyond the configuration's."""
        return {"data_max_length": self.data_max_length}

    def architecture(self) -> Any:
        """The model as plain values."""
        return json.loads(self._config)["model"]

    def saved_architecture(self, path: Path, state: dict[str, Any]) -> Any:
        """The model of a checkpoint as plain values."""
        config = path / CONFIG_FILE
        try:
            saved = json.loads(config.read_text(encoding="utf-8")).get("model")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"checkpoint: {str(config)!r} is damaged ({error})") from error
        return with_current_names(saved)

    def task_state(self) -> dict[str, Any]:
        """The average's trained weights, and the losses that the collapse monitor looks at."""
        return {
            "losses": list(self._collapse.recent),
            "weights": None if self.average is None else self.unwrapped.state_dict(),
            "averaged_steps": 0 if self.average is None else int(self.average.n_averaged),
        }

    def load_task_state(self, path: Path, state: dict[str, Any]) -> None:
        """Put the weights, their average and the monitor's losses back."""
        read_weights(self.evaluated, path / WEIGHTS_FILE)
        if self.average is not None:
            self.unwrapped.load_state_dict(state["weights"] or self.average.module.state_dict())
            self.average.n_averaged.fill_(state["averaged_steps"])
        elif state["weights"] is not None:
            self.unwrapped.load_state_dict(state["weights"])
        self._collapse.recent = deque(state["losses"])

    def write_checkpoint(self, path: Path, state: dict[str, Any]) -> None:
        """Fill a folder with the three files."""
        (path / CONFIG_FILE).write_text(self._config, encoding="utf-8")
        write_weights(self.evaluated, path / WEIGHTS_FILE)
        save_atomically(path / STATE_FILE, state)

    def state_of(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint's folder."""
        return read_checkpoint(path / STATE_FILE)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, atomically; all processes must call it.

        Args:
            path: a folder of the three files; or, where it ends with ``.pt``, one file in
                upstream's format with weights, optimizer, step and random state.

        Raises:
            OSError: it could not be written; what was at ``path`` is as it was.
        """
        path = Path(path)
        if path.suffix == ".pt":
            package = {
                "model": self.accelerator.get_state_dict(self.module),
                "optim": self.optim.state_dict(),
                "steps": self.step,
                "rng": torch.get_rng_state(),
            }
            if self.is_main:
                save_atomically(path, package)
            return
        state = self.state()
        if self.is_main:
            with atomic_folder(path) as temporary:
                self.write_checkpoint(temporary, state)

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint: a folder, or a file of :meth:`save` or of upstream (which
        lacks the step and random state).

        Raises:
            FileNotFoundError: there is no such file or folder.
            CheckpointError: it is damaged, no such checkpoint, or another architecture's.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path: no checkpoint at {path}")
        if path.is_dir():
            self.restore(path, self.state_of(path))
        else:
            self._load_file(path)
        self.loaded(path)

    def _load_file(self, path: Path) -> None:
        package = read_checkpoint(path)
        if not {"model", "optim"} <= package.keys():
            raise CheckpointError(f"path: {path} has no 'model' and 'optim'")
        try:
            self.unwrapped.load_state_dict(package["model"])
            self.load_optimizer(package["optim"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"path: {path} holds another architecture: {error}") from error
        if self.average is not None:
            self.average.module.load_state_dict(package["model"])
            self.average.n_averaged.zero_()
        self.at_step(package.get("steps", 0))
        if "rng" in package:
            torch.set_rng_state(package["rng"])


def _from_arguments(dataset: Any, use_lion: bool, arguments: dict[str, Any]) -> RunOptions:
    # Upstream's defaults, and what is given in their place.
    if arguments.get("num_train_steps") is None and hasattr(dataset, "__len__"):
        arguments["num_train_steps"] = max(1, len(dataset))
    if arguments.get("optimizer") is None:
        arguments["optimizer"] = "lion" if use_lion else "adam"
    elif use_lion and arguments["optimizer"] != "lion":
        fail("use_lion", True, f"False beside optimizer={arguments['optimizer']!r}")
    if "batch_size" not in arguments:
        raise TypeError("missing argument 'batch_size'")
    return UPSTREAM.with_arguments(arguments)


def _describe(mulan: MuLaN, extra: dict[str, Any]) -> tuple[str, str]:
    # The content of config.json, and why it cannot rebuild the model, if it cannot.
    try:
        return config_text(mulan, extra), ""
    except TypeError as error:
        content = {"library": "musiclm_fast", "model": None, "why": str(error)}
        return json.dumps(content) + "\n", str(error)


if MuLaNTrainer.__doc__:  # python -OO has none
    MuLaNTrainer.__doc__ = MuLaNTrainer.__doc__.replace("{arguments}", UPSTREAM.explained())
_init: Any = MuLaNTrainer.__init__
_init.__signature__ = UPSTREAM.signature(
    _init, needed={"batch_size"}, defaults={"num_train_steps": None, "optimizer": None}
)
