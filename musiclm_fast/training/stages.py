"""Trainers of AudioLM's three stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from musiclm_fast._checkpoint import read_checkpoint, save_atomically
from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.audiolm.stage import CHECKPOINT_VERSION
from musiclm_fast.audiolm.wrappers.coarse import CoarseTransformerWrapper
from musiclm_fast.audiolm.wrappers.fine import FineTransformerWrapper
from musiclm_fast.audiolm.wrappers.semantic import SemanticTransformerWrapper
from musiclm_fast.datasets.collation import collate_fields
from musiclm_fast.datasets.sampling import FixedRows, SeededRows
from musiclm_fast.datasets.sound_folder import SoundFolder
from musiclm_fast.nn.modes import evaluation_mode
from musiclm_fast.training.engine import Engine
from musiclm_fast.training.options import (
    OptimizerConfig,
    RunOptions,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
)
from musiclm_fast.training.run_folder import stage_form
from musiclm_fast.training.run_log import Log

#: audiolm-pytorch's defaults, which are those of the stages' trainers.
UPSTREAM = RunOptions(
    OptimizerConfig(
        "adam", 3e-4, (0.9, 0.99), weight_decay=0.0, decay_all_matrices=True, max_grad_norm=0.5
    ),
    ScheduleConfig("constant", warmup_steps=0, final=0.0),
    TrainingConfig("./results", precision=None, seed=42, save_every=1000, keep_best=1, log_every=1),
    ValidationConfig(every=100),
)
# audiolm-pytorch's names of two of the options.
_NAMES = {"weight_decay": "wd", "valid_every": "save_results_every"}
# audiolm-pytorch's arguments without a counterpart here, with the values that change nothing.
_IGNORED = (
    "init_process_group_timeout_seconds", "use_wandb_tracking", "split_batches", "drop_last",
    "average_valid_loss_over_grad_accum_every", "ds_fields",
)  # fmt: skip
_VALID_BATCHES = 4


class StageTrainer(Engine):
    """Trains a stage, and its conditioning embeddings with it; the base of the three trainers.

    With audiolm-pytorch's arguments alone it trains as that does. Checkpoints are single files
    that audiolm-pytorch loads too, see :mod:`musiclm_fast.training.run_folder`.

    Args:
        wrapper: the stage with its tokenizer, codec and conditioner.
        dataset: rows of a clip ``(samples,)``, or tuples of a clip and a text or text_embeds.
        audio_conditioner: of the wrapper: a MuLaNEmbedQuantizer; it is fitted on the dataset if
            it is not yet, and frozen.
        valid_dataset: rows to validate on; default a share of the dataset.
        data_max_length, data_max_length_seconds: clips of a folder are cut to that.
        folder: of sound files, in place of a dataset.
        accelerate_kwargs: passed to accelerate's Accelerator.
        force_clear_prev_results: True deletes what is in results_folder; nothing ever prompts.
        data_sample_hz: rate of the dataset's clips, which are then resampled for everyone; None
            says that they have the tokenizer's.
        fit_clips: of the dataset, how many the quantizer is fitted on.
        resume: go on from the latest checkpoint in results_folder, if there is one.
        num_workers: processes that read rows ahead.
        options: the run's options as a whole, in place of the arguments below.
        **arguments: fields of the options, and ``wd`` for ``weight_decay`` (with AdamW) and
            ``save_results_every`` for ``valid_every``::

    {arguments}
    """

    stage_name: str
    wave_names: tuple[str, ...] = ("raw_wave",)

    def __init__(
        self,
        wrapper: Any,
        *,
        dataset: Dataset[Any] | None,
        valid_dataset: Dataset[Any] | None = None,
        data_max_length: int | None = None,
        data_max_length_seconds: float | None = None,
        folder: str | Path | None = None,
        accelerate_kwargs: dict[str, Any] | None = None,
        force_clear_prev_results: bool | None = None,
        data_sample_hz: int | None = None,
        fit_clips: int = 4096,
        resume: bool = False,
        num_workers: int = 0,
        options: RunOptions | None = None,
        **arguments: Any,
    ) -> None:
        if options is None:
            options = _from_arguments(arguments)
        elif arguments:
            fail("options", "given", f"None beside {', '.join(arguments)}")
        check_positive_int("fit_clips", fit_clips)
        if (dataset is None) == (folder is None):
            both = "neither" if dataset is None else "both"
            fail("dataset, folder", both, "exactly one of them")
        if dataset is None:
            assert folder is not None
            dataset = self._folder(folder, wrapper, data_max_length, data_max_length_seconds)
        self.form, self.task = stage_form(self.stage_name), self.stage_name
        self.data_sample_hz, self.fit_clips = data_sample_hz, fit_clips
        self.sample_hz = data_sample_hz
        # A quantizer takes no gradient, and a stage does not use all of its parts in every step.
        super().__init__(
            wrapper, dataset, options, valid_dataset=valid_dataset,
            accelerate_kwargs=accelerate_kwargs, num_workers=num_workers, resume=resume,
            force_clear_prev_results=force_clear_prev_results, uses_all_parameters=False,
            fused=False,  # on a CPU audiolm-pytorch's steps, bit for bit
        )  # fmt: skip

    def _folder(
        self, folder: str | Path, wrapper: Any, length: int | None, seconds: float | None
    ) -> SoundFolder:
        if length is not None and seconds is not None:
            fail("data_max_length_seconds", seconds, "None beside data_max_length")
        parts = [p for p in (wrapper.wav2vec, wrapper.codec) if p is not None]
        if not parts:
            fail("folder", str(folder), "a dataset: there is no tokenizer or codec to read sound")
        rates = [part.target_sample_hz for part in parts]
        if seconds is not None:
            length = int(seconds * max(rates))
        multiples = [getattr(part, "seq_len_multiple_of", None) for part in parts]
        return SoundFolder(folder, rates, length, multiples)

    @property
    def train_wrapper(self) -> Any:
        """The wrapper, with what accelerate put around it."""
        return self.module

    @property
    def wrapper(self) -> Any:
        """The wrapper itself."""
        return self.unwrapped

    @property
    def transformer(self) -> Any:
        """The stage that is trained."""
        return self.wrapper.transformer

    @property
    def audio_conditioner(self) -> Any:
        """What embeds the clips, or None."""
        return self.wrapper.audio_conditioner

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the stage, see its wrapper."""
        return self.wrapper.generate(*args, **kwargs)

    # ---- the task

    def prepare_module(self, module: nn.Module) -> None:
        """Fit the conditioner's codebooks if need be, and freeze it."""
        wrapper = cast(Any, module)
        conditioner = _with_embeddings(wrapper.audio_conditioner)
        if conditioner is None:
            return
        if not conditioner.fitted:
            self.print("fitting the quantizer's codebooks on the data set")
            # The dataset's clips have the rate of the tokenizer or codec where nothing else is
            # said.
            first = wrapper.codec if wrapper.wav2vec is None else wrapper.wav2vec
            rate = self.data_sample_hz
            if rate is None and conditioner.sample_hz is not None:
                rate = getattr(first, "target_sample_hz", None)
            clips = FixedRows(self.ds, self.seed)  # a resumed run fits the same codebooks
            conditioner.fit(clips, max_latents=self.fit_clips, input_sample_hz=rate, progress=False)
        conditioner.freeze()  # codes that move during training would be others for each stage
        wrapper.transformer.conditioner_fingerprint = conditioner.fingerprint()

    def trained(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The stage's parameters, and the conditioning embeddings of its namespace."""
        wrapper = cast(Any, module)
        named = [*wrapper.transformer.named_parameters()]
        conditioner = _with_embeddings(wrapper.audio_conditioner)
        if conditioner is not None:
            named.append(("cond_embeddings", conditioner.cond_embeddings[self.stage_name]))
        return named

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A batch of rows of clips, texts and embeddings of texts."""
        return collate_fields(rows, self.wave_names)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device, with its rate where the dataset has one of its own."""
        batch = super().inputs(batch)
        if self.data_sample_hz is not None:
            batch["input_sample_hz"] = self.data_sample_hz
        return batch

    def size_of(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Clips and samples of a batch."""
        wave = inputs[self.wave_names[0]]
        return len(wave), wave.numel()

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        """The cross entropy of the stage's tokens."""
        with self.accelerator.autocast():
            return cast(Tensor, self.module(**inputs, return_loss=True))

    def measure(self) -> Log:
        """The mean loss over the validation set's first batches."""
        return {"valid_loss": self.validate()}

    @torch.no_grad()
    def validate(self, batches: int | None = None) -> float:
        """Mean loss of the validation set's first batches in eval mode; NaN without rows.

        Args:
            batches: how many; None is as many as ``valid_rows`` fill.
        """
        rows = len(self.valid_ds)  # type: ignore[arg-type]
        if rows == 0:
            return float("nan")
        size = min(self.batch_size, rows)
        if batches is None:
            batches = -(-self.options.validation.rows // size)
        count = min(rows, batches * size)
        loader = DataLoader(
            SeededRows(self.valid_ds, self.seed),
            batch_sampler=[
                [(row, row) for row in range(start, min(start + size, count))]
                for start in range(0, count, size)
            ],
            collate_fn=self.collate,
            generator=torch.Generator(),  # else it would draw from the model's
        )
        with evaluation_mode(self.wrapper):
            losses = [
                self.wrapper(**self.inputs(batch), return_loss=True).item() for batch in loader
            ]
        return sum(losses) / len(losses)

    # ---- checkpoints

    def facts(self) -> dict[str, Any]:
        """Options beyond the configuration's."""
        return {"data_sample_hz": self.data_sample_hz}

    def write_checkpoint(self, path: Path, state: dict[str, Any]) -> None:
        """Write the file, in audiolm-pytorch's format with the state of training added."""
        package: dict[str, Any] = {
            "model": self.transformer.state_dict(),
            "optim": state["optimizer"],
            "version": CHECKPOINT_VERSION,
            "steps": self.step,
            "training": {name: value for name, value in state.items() if name != "optimizer"},
        }
        conditioner = _with_embeddings(self.audio_conditioner)
        if conditioner is not None:
            package["conditioning"] = {
                "namespace": self.stage_name,
                "embeds": conditioner.cond_embeddings[self.stage_name].detach().cpu(),
                "fingerprint": conditioner.fingerprint(),
            }
        save_atomically(path, package)

    def state_of(self, path: Path) -> dict[str, Any]:
        """The state in a checkpoint's file."""
        return _state_in(read_checkpoint(path))

    def load_task_state(self, path: Path, state: dict[str, Any]) -> None:
        """Put the stage's weights and its conditioning back."""
        self.transformer.load(path, audio_conditioner=_with_embeddings(self.audio_conditioner))

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, atomically; all processes must call it. audiolm-pytorch loads it too.

        Raises:
            OSError: it could not be written; what was at ``path`` is as it was.
        """
        state = self.state()
        if self.is_main:
            self.write_checkpoint(Path(path), state)

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint of :meth:`save`, or from one of audiolm-pytorch.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such checkpoint, another architecture's, or another conditioner's.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: no checkpoint at {path}")
        package = read_checkpoint(path)
        if "training" in package:
            self.restore(path, _state_in(package))
        else:
            self._load_other(path, package)
        self.loaded(path)

    def _load_other(self, path: Path, package: dict[str, Any]) -> None:
        # A file of audiolm-pytorch, or of an earlier version, which kept one generator.
        self.load_task_state(path, {})
        if "steps" in package:
            self.load_optimizer(package["optim"])
            self.at_step(package["steps"])
            torch.set_rng_state(package["rng"])
            return
        # audiolm-pytorch puts the step into the name, and saves before it counts it.
        numbers = re.findall(r"\d+", path.name)
        self.at_step(int(numbers[-1]) + 1 if numbers else 0)
        if _with_embeddings(self.audio_conditioner) is None:
            self.load_optimizer(package["optim"])


def _state_in(package: dict[str, Any]) -> dict[str, Any]:
    # The engine's state in a checkpoint's content.
    return {**package.get("training", {}), "optimizer": package.get("optim")}


def _with_embeddings(conditioner: Any) -> Any:
    # The conditioner, if it has conditioning embeddings that are trained with a stage; else None.
    return conditioner if hasattr(conditioner, "cond_embeddings") else None


def _from_arguments(arguments: dict[str, Any]) -> RunOptions:
    # audiolm-pytorch's defaults, and what is given in their place.
    for name in _IGNORED:
        if arguments.pop(name, None) and name == "use_wandb_tracking":
            fail(name, True, "log_with='wandb'")
    for name in ("num_train_steps", "batch_size"):
        if name not in arguments:
            raise TypeError(f"missing argument {name!r}")
    if (arguments.get("wd") or arguments.get("weight_decay")) and "optimizer" not in arguments:
        arguments["optimizer"] = "adamw"
    options = UPSTREAM.with_arguments(arguments, _NAMES)
    if "valid_rows" in arguments:
        return options
    return options.with_arguments({"valid_rows": _VALID_BATCHES * options.training.batch_size})


class SemanticTransformerTrainer(StageTrainer):
    """Trains a SemanticTransformer; see :class:`StageTrainer` for the arguments.

    Args:
        wav2vec: semantic tokenizer.
        transformer: the stage.
    """

    stage_name = "semantic"

    def __init__(
        self,
        wav2vec: nn.Module | None,
        transformer: SemanticTransformer,
        *,
        audio_conditioner: nn.Module | None = None,
        dataset: Dataset[Any] | None = None,
        **arguments: Any,
    ) -> None:
        wrapper = SemanticTransformerWrapper(
            wav2vec=wav2vec, transformer=transformer, audio_conditioner=audio_conditioner
        )
        super().__init__(wrapper, dataset=dataset, **arguments)


class CoarseTransformerTrainer(StageTrainer):
    """Trains a CoarseTransformer; see :class:`StageTrainer` for the arguments.

    Rows hold a clip for the semantic tokenizer and the conditioner and, where the codec's rate is
    another, one for the codec; with ``data_sample_hz`` one clip is resampled for all.

    Args:
        transformer: the stage.
        codec: the codec.
        wav2vec: semantic tokenizer.
    """

    stage_name = "coarse"
    wave_names = ("raw_wave", "raw_wave_for_codec")

    def __init__(
        self,
        transformer: CoarseTransformer,
        codec: nn.Module,
        wav2vec: nn.Module | None,
        *,
        audio_conditioner: nn.Module | None = None,
        dataset: Dataset[Any] | None = None,
        **arguments: Any,
    ) -> None:
        wrapper = CoarseTransformerWrapper(
            codec=codec, wav2vec=wav2vec, transformer=transformer,
            audio_conditioner=audio_conditioner,
        )  # fmt: skip
        super().__init__(wrapper, dataset=dataset, **arguments)


class FineTransformerTrainer(StageTrainer):
    """Trains a FineTransformer; see :class:`StageTrainer` for the arguments.

    Args:
        transformer: the stage.
        codec: the codec.
    """

    stage_name = "fine"

    def __init__(
        self,
        transformer: FineTransformer,
        codec: nn.Module,
        *,
        audio_conditioner: nn.Module | None = None,
        dataset: Dataset[Any] | None = None,
        **arguments: Any,
    ) -> None:
        wrapper = FineTransformerWrapper(
            codec=codec, transformer=transformer, audio_conditioner=audio_conditioner
        )
        super().__init__(wrapper, dataset=dataset, **arguments)


TRAINERS = {
    trainer.stage_name: trainer
    for trainer in (SemanticTransformerTrainer, CoarseTransformerTrainer, FineTransformerTrainer)
}
if StageTrainer.__doc__:  # python -OO has none
    StageTrainer.__doc__ = StageTrainer.__doc__.replace("{arguments}", UPSTREAM.explained())
for _trainer in TRAINERS.values():
    _init: Any = _trainer.__init__
    _init.__signature__ = UPSTREAM.signature(
        _init, StageTrainer.__init__, needed={"num_train_steps", "batch_size"}, names=_NAMES
    )
