"""A tiny run with every source of chance on, and a program that makes one: to be killed."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast import AudioSpectrogramTransformer, MuLaN, MuLaNTrainer, TextTransformer

ROWS = 20
SIZE: dict[str, Any] = dict(dim=16, depth=1, heads=2, dim_head=8)
QUIET = dict(patch_dropout_prob=0.0, spec_aug_freq_mask=0, spec_aug_time_mask=0)


def make_mulan(dropout: float = 0.1, audio: dict[str, Any] | None = None, **options: Any) -> MuLaN:
    """Masks for the batch, patch dropout and dropout unless told otherwise."""
    torch.manual_seed(0)
    dropouts = dict(attn_dropout=dropout, ff_dropout=dropout)
    audio = dict(spec_aug_freq_mask=10, spec_aug_time_mask=10) | (audio or {})
    return MuLaN(
        AudioSpectrogramTransformer(**SIZE, **dropouts, **audio),
        TextTransformer(num_tokens=30, max_seq_len=8, **SIZE, **dropouts),
        dim_latent=8,
        **options,
    )


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Clips of a tone in fresh noise each time, with token ids that say which.

    ``pause``: seconds that a clip takes at least, so that no machine is too fast to be killed.
    """

    def __init__(self, rows: int = ROWS, noise: float = 0.3, pause: float = 0.0) -> None:
        self.rows, self.noise, self.pause = rows, noise, pause

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        moments = torch.arange(800) / 800
        tone = torch.sin(2 * torch.pi * (10 + 15 * index) * moments)
        return tone + self.noise * torch.randn(800), torch.tensor([index + 1, 1 + index % 5])


OPTIONS: dict[str, Any] = dict(
    num_train_steps=8, batch_size=4, valid_frac=0.2, save_model_every=3, lr=1e-3, optimizer="adamw",
    weight_decay=0.1, schedule="cosine", warmup_steps=2, ema_decay=0.9, grad_accum_every=2,
)  # fmt: skip


def make_trainer(folder: Path, **options: Any) -> MuLaNTrainer:
    """A trainer with :data:`OPTIONS` but for what is given."""
    model = options.pop("mulan", None) or make_mulan()
    dataset = options.pop("dataset", None) or Noisy()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the states of these two are saved and compared as well
    random.seed(1)
    return MuLaNTrainer(model, dataset, results_folder=folder, **{**OPTIONS, **options})


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[2])
    clips = Noisy(pause=given.pop("pause", 0.0))
    make_trainer(Path(sys.argv[1]), resume=True, dataset=clips, **given).train()
