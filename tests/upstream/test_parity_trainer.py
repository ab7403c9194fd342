"""MuLaNTrainer against upstream: the same losses, checkpoints both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import musiclm_fast
from tests.upstream import live
from tests.upstream.test_parity_mulan import build

ROWS = 6


class Notes(Dataset):
    """Clips with token ids, or with texts."""

    def __init__(self, raw: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.clips = torch.randn(ROWS, 1300, generator=generator)
        self.ids = torch.randint(1, 50, (ROWS, 7), generator=generator)
        self.raw = raw

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | str]:
        return self.clips[index], f"note number {index}" if self.raw else self.ids[index]


def quiet_pair(raw: bool = False) -> live.Pair:
    """Models that draw no random numbers, so that the order of a batch does not matter."""
    quiet = dict(patch_dropout_prob=0.0, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    text = dict(num_tokens=49_408) if raw else {}
    return live.pair(lambda package: build(package, audio=quiet, text=text))


def trainers(
    upstream: live.Upstream, pair: live.Pair, folder: Path, raw: bool = False, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Ours and upstream's, whose every batch is the whole dataset in some order."""
    arguments = dict(dataset=Notes(raw), num_train_steps=4, batch_size=ROWS, valid_frac=0.0)
    arguments |= dict(save_model_every=1000, force_clear_prev_results=False, lr=1e-3) | options
    ours = musiclm_fast.MuLaNTrainer(
        mulan=pair.ours, results_folder=str(folder / "ours"), **arguments
    )
    theirs = upstream.musiclm.MuLaNTrainer(
        mulan=pair.upstream, results_folder=str(folder / "theirs"), **arguments
    )
    return ours, theirs


def losses(trainer: nn.Module, steps: int) -> list[float]:
    return [trainer.train_step()["loss"] for _ in range(steps)]


OPTIONS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "Lion": dict(use_lion=True, lr=1e-4),
    "two batches a step": dict(grad_accum_every=2),
    "gradients not clipped": dict(max_grad_norm=None),
    "gradients clipped to 0.01": dict(max_grad_norm=0.01),
    "clips cut to 1,000 samples": dict(data_max_length=1000),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_losses(upstream: live.Upstream, tmp_path: Path, options: dict[str, Any]):
    ours, theirs = trainers(upstream, quiet_pair(), tmp_path, **options)
    wanted = losses(theirs, 4)
    # Adam and Lion step by lr along the sign of a gradient that is all rounding (the position
    # bias's last bias), which moves no loss; others differ by rounding only
    assert losses(ours, 4) == pytest.approx(wanted, rel=1e-4)
    assert abs(wanted[0] - wanted[-1]) > 1e-3, "four steps should move the loss"


def test_losses_with_raw_texts(upstream: live.Upstream, tmp_path: Path):
    ours, theirs = trainers(upstream, quiet_pair(raw=True), tmp_path, raw=True)
    assert losses(ours, 3) == pytest.approx(losses(theirs, 3), rel=1e-4)


def test_train_runs_to_the_last_step(upstream: live.Upstream, tmp_path: Path):
    logged: list[list[dict[str, float]]] = []
    for trainer in trainers(upstream, quiet_pair(), tmp_path):
        logs: list[dict[str, float]] = []
        trainer.train(log_fn=logs.append)
        assert int(trainer.steps) == 4
        logged.append(logs)
    ours, theirs = ([log["loss"] for log in logs] for logs in logged)
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("direction", ["from upstream", "to upstream"])
def test_checkpoints(upstream: live.Upstream, tmp_path: Path, direction: str):
    ours, theirs = trainers(upstream, quiet_pair(), tmp_path)
    here, there = (theirs, ours) if direction == "from upstream" else (ours, theirs)
    losses(here, 2)
    here.save(tmp_path / "mulan.pt")
    there.load(tmp_path / "mulan.pt")
    assert losses(there, 2) == pytest.approx(losses(here, 2), rel=1e-4)
