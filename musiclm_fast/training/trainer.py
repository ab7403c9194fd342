"""MuLaNTrainer: trains a MuLaN on a dataset of clips and texts."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, random_split
from tqdm.auto import tqdm

from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.training.checkpoint import save_atomically
from musiclm_fast.training.data import collate

Log = dict[str, float]


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches, epoch after epoch without end, from any position.

    The order of an epoch is a function of seed and epoch alone, so that a resumed run goes on
    with the batch at which it stopped. A last batch that is not full is left out.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int = 0) -> None:
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while True:
            epoch, first = divmod(position, self.per_epoch)
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
            for index in range(first, self.per_epoch):
                yield order[index * self.batch_size : (index + 1) * self.batch_size]
            position = (epoch + 1) * self.per_epoch


class _EveryNth(Sampler[list[int]]):
    # One process's share of the batches.
    def __init__(self, batches: EpochBatches, processes: int, index: int) -> None:
        self.batches, self.processes, self.index = batches, processes, index

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(iter(self.batches), self.index, None, self.processes)


class MuLaNTrainer(nn.Module):
    """Trains a MuLaN with Adam or Lion.

    Args:
        mulan: the model.
        dataset: rows of (clip, text), see :func:`collate`.
        num_train_steps: optimizer steps; None is one per row of the dataset, as the reference.
        batch_size: pairs per step and process, at least 2.
        data_max_length: clips are cut to that many samples.
        folder: ignored, as in the reference.
        lr: learning rate.
        grad_accum_every: batches per optimizer step.
        betas: of the optimizer.
        max_grad_norm: gradients are clipped to this norm; None for no clipping.
        valid_frac: share of the dataset that is kept for validation.
        random_split_seed: seed of that split and of the order of batches.
        save_model_every: steps between checkpoints (and validations).
        results_folder: where checkpoints go.
        accelerate_kwargs: passed to accelerate's Accelerator.
        use_lion: Lion in place of Adam.
        force_clear_prev_results: True deletes what is in results_folder. Nothing else does, and
            nothing ever prompts.

    Raises:
        ValueError: a batch of one, or a dataset smaller than a batch.
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
    ) -> None:
        super().__init__()
        check_positive_int("batch_size", batch_size)
        if batch_size < 2:
            fail("batch_size", batch_size, "at least 2: a contrast needs a negative")
        check_positive_int("grad_accum_every", grad_accum_every)
        check_positive_int("save_model_every", save_model_every)
        rows = len(dataset)  # type: ignore[arg-type]
        valid_rows = rows - int((1 - valid_frac) * rows) if valid_frac > 0 else 0
        if rows - valid_rows < batch_size:
            fail(
                "dataset",
                f"{rows - valid_rows} rows for training ({rows} in all)",
                f"at least one batch of {batch_size}",
            )
        self.accelerator = Accelerator(**(accelerate_kwargs or {}))
        self.register_buffer("steps", torch.zeros(1))
        self.num_train_steps = rows if num_train_steps is None else num_train_steps
        self.batch_size = batch_size
        self.grad_accum_every = grad_accum_every
        self.max_grad_norm = max_grad_norm
        self.data_max_length = data_max_length
        self.save_model_every = save_model_every
        self.seed = random_split_seed

        self.ds: Dataset[Any] = dataset
        self.valid_ds: Dataset[Any] = dataset
        if valid_rows:
            generator = torch.Generator().manual_seed(random_split_seed)
            self.ds, self.valid_ds = random_split(
                dataset, [rows - valid_rows, valid_rows], generator=generator
            )
            self.print(
                f"training with dataset of {rows - valid_rows} samples and validating with "
                f"randomly splitted {valid_rows} samples"
            )
        else:
            self.print(f"training with shared training and valid dataset of {rows} samples")

        optimizer: torch.optim.Optimizer
        if use_lion:
            from lion_pytorch import Lion

            optimizer = Lion(mulan.parameters(), lr=lr, betas=betas)
        else:
            optimizer = torch.optim.Adam(mulan.parameters(), lr=lr, betas=betas)
        self.mulan, self.optim = self.accelerator.prepare(mulan, optimizer)
        self.accelerator.init_trackers(
            "mulan",
            config={
                "num_train_steps": self.num_train_steps,
                "data_max_length": data_max_length,
                "learning_rate": lr,
            },
        )

        self.results_folder = Path(results_folder)
        if force_clear_prev_results and self.is_main and self.results_folder.exists():
            shutil.rmtree(self.results_folder)
        self.accelerator.wait_for_everyone()
        self.results_folder.mkdir(parents=True, exist_ok=True)
        self._batches: Iterator[dict[str, Any]] | None = None

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

    def print(self, msg: str) -> None:
        """Print once, not once per process, above a progress bar."""
        if self.is_main:
            tqdm.write(msg)

    def save(self, path: str | Path) -> None:
        """Write weights, optimizer, step and random state to ``path``, atomically."""
        if not self.is_main:
            return
        path = Path(path)
        package = {
            "model": self.accelerator.get_state_dict(self.mulan),
            "optim": self.optim.state_dict(),
            "steps": int(self.steps.item()),
            "rng": torch.get_rng_state(),
        }
        save_atomically(path, package)

    def load(self, path: str | Path) -> None:
        """Go on from a checkpoint of :meth:`save`, or from one of the reference (which lacks the
        step and random state).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a checkpoint, or another architecture's.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path: no checkpoint at {path}")
        try:
            package = torch.load(path, map_location="cpu", weights_only=True)
            model, optim = package["model"], package["optim"]
        except Exception as error:
            raise ValueError(f"path: {path} is not a readable checkpoint: {error}") from error
        try:
            self.accelerator.unwrap_model(self.mulan).load_state_dict(model)
        except RuntimeError as error:
            raise ValueError(f"path: {path} holds another architecture: {error}") from error
        self.optim.load_state_dict(optim)
        self.steps.fill_(package.get("steps", 0))
        if "rng" in package:
            torch.set_rng_state(package["rng"])
        self._batches = None

    def _loader(self) -> Iterator[dict[str, Any]]:
        # Every process walks the same order and takes each of its num_processes-th batches.
        processes = self.accelerator.num_processes
        start = int(self.steps.item()) * self.grad_accum_every * processes
        size = len(self.ds)  # type: ignore[arg-type]
        order = EpochBatches(size, self.batch_size, self.seed, start)
        own = _EveryNth(order, processes, self.accelerator.process_index)
        return iter(DataLoader(self.ds, batch_sampler=own, collate_fn=collate))

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        batch["wavs"] = batch["wavs"][:, : self.data_max_length]
        return batch

    def train_step(self) -> Log:
        """One optimizer step.

        Returns:
            ``{"loss": ...}``, the mean over the accumulated batches.
        """
        if self._batches is None:
            self._batches = self._loader()
        self.mulan.train()
        total = 0.0
        for _ in range(self.grad_accum_every):
            loss = self.mulan(**self._inputs(next(self._batches))) / self.grad_accum_every
            self.accelerator.backward(loss)
            total += loss.item()
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.mulan.parameters(), self.max_grad_norm)
        self.optim.step()
        self.optim.zero_grad()
        self.steps += 1
        step = int(self.steps.item())
        logs = {"loss": total}
        self.accelerator.log({"train_loss": total}, step=step)
        if step % self.save_model_every == 0:
            logs["valid_loss"] = self.validate()
            self.accelerator.log({"valid_loss": logs["valid_loss"]}, step=step)
            self.save(self.results_folder / f"mulan.{step}.pt")
        return logs

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation set in eval mode; NaN if it holds fewer than two rows."""
        rows = len(self.valid_ds)  # type: ignore[arg-type]
        size = min(self.batch_size, rows)
        if size < 2:
            return float("nan")
        self.mulan.eval()
        loader = DataLoader(self.valid_ds, batch_size=size, collate_fn=collate, drop_last=True)
        losses = [self.mulan(**self._inputs(batch)).item() for batch in loader]
        self.mulan.train()
        return sum(losses) / len(losses)

    def train(self, log_fn: Callable[[Log], Any] | None = None) -> None:  # type: ignore[override]
        """Train to ``num_train_steps`` with a progress bar; ``log_fn`` is called with each log."""
        done = int(self.steps.item())
        bar = tqdm(
            total=self.num_train_steps, initial=done, unit="step", disable=not self.is_local_main
        )
        with bar:
            while int(self.steps.item()) < self.num_train_steps:
                logs = self.train_step()
                bar.update()
                bar.set_postfix({name: f"{value:.4f}" for name, value in logs.items()})
                if log_fn is not None:
                    log_fn(logs)
        self.print("training complete")
