"""Trainers of AudioLM's three stages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split
from tqdm.auto import tqdm

from musiclm_fast._checkpoint import save_atomically
from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.audiolm.stage import CHECKPOINT_VERSION
from musiclm_fast.audiolm.wrappers.coarse import CoarseTransformerWrapper
from musiclm_fast.audiolm.wrappers.fine import FineTransformerWrapper
from musiclm_fast.audiolm.wrappers.semantic import SemanticTransformerWrapper
from musiclm_fast.datasets.sampling import EpochBatches, EveryNth
from musiclm_fast.datasets.sound_folder import SoundFolder
from musiclm_fast.datasets.wave_collation import collate_fields
from musiclm_fast.training.accelerated import Accelerator, DistributedDataParallelKwargs

Log = dict[str, float]


class _StageTrainer(nn.Module):
    # Trains one wrapper. The subclasses give audiolm-pytorch's arguments their order.

    steps: Tensor
    stage_name: str
    wave_names: tuple[str, ...] = ("raw_wave",)

    def __init__(
        self,
        wrapper: Any,
        *,
        num_train_steps: int,
        batch_size: int,
        dataset: Dataset[Any] | None,
        valid_dataset: Dataset[Any] | None = None,
        data_max_length: int | None = None,
        data_max_length_seconds: float | None = None,
        folder: str | Path | None = None,
        lr: float = 3e-4,
        grad_accum_every: int = 1,
        wd: float = 0.0,
        max_grad_norm: float | None = 0.5,
        valid_frac: float = 0.05,
        random_split_seed: int = 42,
        save_results_every: int = 100,
        save_model_every: int = 1000,
        results_folder: str | Path = "./results",
        accelerate_kwargs: dict[str, Any] | None = None,
        force_clear_prev_results: bool | None = None,
        data_sample_hz: int | None = None,
        fit_clips: int = 4096,
        **ignored: Any,
    ) -> None:
        super().__init__()
        _check_ignored(ignored)
        for name, value in (
            ("num_train_steps", num_train_steps), ("batch_size", batch_size),
            ("grad_accum_every", grad_accum_every), ("save_results_every", save_results_every),
            ("save_model_every", save_model_every),
        ):  # fmt: skip
            check_positive_int(name, value)
        if (dataset is None) == (folder is None):
            both = "neither" if dataset is None else "both"
            fail("dataset, folder", both, "exactly one of them")
        if dataset is None:
            assert folder is not None
            dataset = self._folder(folder, wrapper, data_max_length, data_max_length_seconds)
        self.num_train_steps, self.batch_size = num_train_steps, batch_size
        self.grad_accum_every, self.max_grad_norm = grad_accum_every, max_grad_norm
        self.save_results_every, self.save_model_every = save_results_every, save_model_every
        self.seed, self.data_sample_hz = random_split_seed, data_sample_hz
        self.register_buffer("steps", torch.tensor(0))

        rows = len(dataset)  # type: ignore[arg-type]
        self.ds: Dataset[Any] = dataset
        self.valid_ds: Dataset[Any] = dataset if valid_dataset is None else valid_dataset
        if valid_dataset is None and valid_frac > 0:
            train = int((1 - valid_frac) * rows)
            split = torch.Generator().manual_seed(random_split_seed)
            self.ds, self.valid_ds = random_split(dataset, [train, rows - train], generator=split)
        own = len(self.ds)  # type: ignore[arg-type]
        if own < batch_size:
            fail("dataset", f"{own} rows for training", f"at least one batch of {batch_size}")

        kwargs = dict(accelerate_kwargs or {})
        handlers = kwargs.pop("kwargs_handlers", [])
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(kwargs_handlers=[ddp, *handlers], **kwargs)
        conditioner = wrapper.audio_conditioner
        trained = list(wrapper.transformer.parameters())
        if hasattr(conditioner, "cond_embeddings"):
            first = wrapper.codec if wrapper.wav2vec is None else wrapper.wav2vec
            self._prepare(conditioner, first, fit_clips)
            wrapper.transformer.conditioner_fingerprint = conditioner.fingerprint()
            trained.append(conditioner.cond_embeddings[self.stage_name])
        self.trained_parameters = trained
        optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.99))
        if wd > 0:
            groups: list[dict[str, Any]] = [
                {"params": [p for p in trained if p.ndim >= 2]},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=wd)
        self.train_wrapper, self.optim = self.accelerator.prepare(wrapper, optimizer)
        self.accelerator.init_trackers(
            self.stage_name, config={"num_train_steps": num_train_steps, "learning_rate": lr}
        )
        self.results_folder = Path(results_folder)
        if force_clear_prev_results and self.is_main and self.results_folder.exists():
            shutil.rmtree(self.results_folder)
        self.accelerator.wait_for_everyone()
        self.results_folder.mkdir(parents=True, exist_ok=True)
        self._batches: Iterator[dict[str, Any]] | None = None

    def _prepare(self, conditioner: Any, first: Any, fit_clips: int) -> None:
        # Codes that move during training would be others for each stage. The data set's clips
        # have the rate of first, the tokenizer or codec, where nothing else is said.
        if not conditioner.fitted:
            self.accelerator.print("fitting the quantizer's codebooks on the data set")
            conditioner.to(self.accelerator.device)
            rate = self.data_sample_hz
            if rate is None and conditioner.sample_hz is not None:
                rate = getattr(first, "target_sample_hz", None)
            conditioner.fit(self.ds, max_latents=fit_clips, input_sample_hz=rate, progress=False)
        conditioner.freeze()

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
    def wrapper(self) -> Any:
        """The wrapper itself, whatever accelerate put around it."""
        return self.accelerator.unwrap_model(self.train_wrapper)

    @property
    def transformer(self) -> Any:
        """The stage that is trained."""
        return self.wrapper.transformer

    @property
    def audio_conditioner(self) -> Any:
        """What embeds the clips, or None."""
        return self.wrapper.audio_conditioner

    @property
    def device(self) -> torch.device:
        """Where the stage lies."""
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

    def print(self, message: str) -> None:
        """Print once, not once per process, above a progress bar."""
        if self.is_main:
            tqdm.write(message)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the stage, see its wrapper."""
        return self.wrapper.generate(*args, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write the stage, its conditioning, optimizer, step and random state, atomically.

        audiolm-pytorch loads the file too.
        """
        if not self.is_main:
            return
        package: dict[str, Any] = {
            "model": self.transformer.state_dict(),
            "optim": self.optim.state_dict(),
            "version": CHECKPOINT_VERSION,
            "steps": int(self.steps.item()),
            "rng": torch.get_rng_state(),
        }
        conditioner = self.audio_conditioner
        if hasattr(conditioner, "cond_embeddings"):
            package["conditioning"] = {
                "namespace": self.stage_name,
                "embeds": conditioner.cond_embeddings[self.stage_name].detach().cpu(),
                "fingerprint": conditioner.fingerprint(),
            }
        save_atomically(path, package)

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint of :meth:`save`, or from one of audiolm-pytorch.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such checkpoint, another architecture's, or another conditioner's.
        """
        conditioner = self.audio_conditioner
        known = conditioner if hasattr(conditioner, "cond_embeddings") else None
        package = self.transformer.load(path, audio_conditioner=known)
        if "steps" in package:
            self.optim.load_state_dict(package["optim"])
            self.steps.fill_(package["steps"])
            torch.set_rng_state(package["rng"].cpu())
        else:
            # audiolm-pytorch puts the step into the name, and saves before it counts it.
            numbers = re.findall(r"\d+", Path(path).name)
            self.steps.fill_(int(numbers[-1]) + 1 if numbers else 0)
            if known is None:
                self.optim.load_state_dict(package["optim"])
        self._batches = None

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        if self.data_sample_hz is not None:
            batch["input_sample_hz"] = self.data_sample_hz
        return batch

    def _collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        return collate_fields(rows, self.wave_names)

    def _loader(self) -> Iterator[dict[str, Any]]:
        processes = self.accelerator.num_processes
        start = int(self.steps.item()) * self.grad_accum_every * processes
        order = EpochBatches(len(self.ds), self.batch_size, self.seed, start)  # type: ignore[arg-type]
        own = EveryNth(order, processes, self.accelerator.process_index)
        return iter(self._data(self.ds, batch_sampler=own))

    def _data(self, rows: Dataset[Any], **options: Any) -> DataLoader[Any]:
        # A loader draws a seed for its workers: from a generator of its own, so that a resumed
        # run, which makes a new loader, goes on with the random numbers of the one that stopped.
        return DataLoader(
            rows, collate_fn=self._collate, generator=torch.Generator().manual_seed(0), **options
        )

    def train_step(self) -> Log:
        """One optimizer step.

        Returns:
            ``{"loss": ...}``, and ``valid_loss`` every ``save_results_every`` steps.
        """
        if self._batches is None:
            self._batches = self._loader()
        self.train_wrapper.train()
        total = 0.0
        for _ in range(self.grad_accum_every):
            inputs = self._inputs(next(self._batches))
            with self.accelerator.autocast():
                loss = self.train_wrapper(**inputs, return_loss=True) / self.grad_accum_every
            self.accelerator.backward(loss)
            total += loss.item()
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.trained_parameters, self.max_grad_norm)
        self.optim.step()
        self.optim.zero_grad()
        self.steps += 1
        step = int(self.steps.item())
        logs = {"loss": total}
        self.accelerator.log({"train_loss": total}, step=step)
        if step % self.save_results_every == 0:
            logs["valid_loss"] = self.validate()
            self.accelerator.log({"valid_loss": logs["valid_loss"]}, step=step)
        if step % self.save_model_every == 0:
            self.save(self.results_folder / f"{self.stage_name}.transformer.{step}.pt")
        return logs

    @torch.no_grad()
    def validate(self, batches: int = 4) -> float:
        """Mean loss of some batches of the validation set in eval mode; NaN without rows."""
        rows = len(self.valid_ds)  # type: ignore[arg-type]
        if rows == 0:
            return float("nan")
        self.wrapper.eval()
        loader = self._data(self.valid_ds, batch_size=min(self.batch_size, rows))
        losses = []
        for batch, _ in zip(loader, range(batches), strict=False):
            losses.append(self.wrapper(**self._inputs(batch), return_loss=True).item())
        self.wrapper.train()
        return sum(losses) / len(losses)

    def train(self, log_fn: Callable[[Log], Any] | None = None) -> None:  # type: ignore[override]
        """Train to ``num_train_steps`` with a progress bar; ``log_fn`` is called with each log."""
        done = int(self.steps.item())
        bar = tqdm(
            total=self.num_train_steps, initial=done, unit="step", desc=self.stage_name,
            disable=not self.is_local_main,
        )  # fmt: skip
        with bar:
            while int(self.steps.item()) < self.num_train_steps:
                logs = self.train_step()
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in logs.items()})
                if log_fn is not None:
                    log_fn(logs)
        self.print("training complete")


# audiolm-pytorch's arguments without a counterpart here, with the values that change nothing
_IGNORED = (
    "init_process_group_timeout_seconds", "use_wandb_tracking", "split_batches", "drop_last",
    "average_valid_loss_over_grad_accum_every", "ds_fields",
)  # fmt: skip


def _check_ignored(given: dict[str, Any]) -> None:
    for name in given:
        if name not in _IGNORED:
            raise TypeError(f"unexpected argument {name!r}")
    if given.get("use_wandb_tracking"):
        fail("use_wandb_tracking", True, "accelerate_kwargs={'log_with': 'wandb'}")


class SemanticTransformerTrainer(_StageTrainer):
    """Trains a SemanticTransformer, and its conditioning embeddings with it.

    Args:
        wav2vec: semantic tokenizer.
        transformer: the stage.
        num_train_steps: optimizer steps.
        batch_size: clips per step and process.
        audio_conditioner: a MuLaNEmbedQuantizer; it is fitted on the data set if it is not yet,
            and frozen.
        dataset: rows of a clip ``(samples,)``, or tuples of a clip and a text or text_embeds.
        valid_dataset: rows to validate on; default a share of the data set.
        data_max_length, data_max_length_seconds: clips of a folder are cut to that.
        folder: of sound files, in place of a data set.
        lr, wd: of Adam, or AdamW with weight decay.
        grad_accum_every: batches per optimizer step.
        max_grad_norm: gradients are clipped to this norm; None for no clipping.
        valid_frac: share of the data set that is kept for validation.
        random_split_seed: seed of that split and of the order of batches.
        save_results_every: steps between validations.
        save_model_every: steps between checkpoints.
        results_folder: where they go.
        accelerate_kwargs: passed to accelerate's Accelerator.
        force_clear_prev_results: True deletes what is in results_folder; nothing ever prompts.
        data_sample_hz: rate of the data set's clips, which are then resampled for everyone; None
            says that they have the tokenizer's.
        fit_clips: of the data set, how many the quantizer is fitted on.
    """

    stage_name = "semantic"

    def __init__(
        self,
        wav2vec: nn.Module | None,
        transformer: SemanticTransformer,
        *,
        num_train_steps: int,
        batch_size: int,
        audio_conditioner: nn.Module | None = None,
        dataset: Dataset[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        wrapper = SemanticTransformerWrapper(
            wav2vec=wav2vec, transformer=transformer, audio_conditioner=audio_conditioner
        )
        super().__init__(
            wrapper, num_train_steps=num_train_steps, batch_size=batch_size, dataset=dataset,
            **kwargs,
        )  # fmt: skip


class CoarseTransformerTrainer(_StageTrainer):
    """Trains a CoarseTransformer; see :class:`SemanticTransformerTrainer`.

    Rows hold a clip for the semantic tokenizer and the conditioner and, where the codec's rate is
    another, one for the codec; with ``data_sample_hz`` one clip is resampled for all.
    """

    stage_name = "coarse"
    wave_names = ("raw_wave", "raw_wave_for_codec")

    def __init__(
        self,
        transformer: CoarseTransformer,
        codec: nn.Module,
        wav2vec: nn.Module | None,
        *,
        num_train_steps: int,
        batch_size: int,
        audio_conditioner: nn.Module | None = None,
        dataset: Dataset[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        wrapper = CoarseTransformerWrapper(
            codec=codec, wav2vec=wav2vec, transformer=transformer,
            audio_conditioner=audio_conditioner,
        )  # fmt: skip
        super().__init__(
            wrapper, num_train_steps=num_train_steps, batch_size=batch_size, dataset=dataset,
            **kwargs,
        )  # fmt: skip


class FineTransformerTrainer(_StageTrainer):
    """Trains a FineTransformer; see :class:`SemanticTransformerTrainer`."""

    stage_name = "fine"

    def __init__(
        self,
        transformer: FineTransformer,
        codec: nn.Module,
        *,
        num_train_steps: int,
        batch_size: int,
        audio_conditioner: nn.Module | None = None,
        dataset: Dataset[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        wrapper = FineTransformerWrapper(
            codec=codec, transformer=transformer, audio_conditioner=audio_conditioner
        )
        super().__init__(
            wrapper, num_train_steps=num_train_steps, batch_size=batch_size, dataset=dataset,
            **kwargs,
        )  # fmt: skip
