"""A program that one of several processes runs: the scenarios of test_trainer_distributed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from musiclm_fast import MuLaNTrainer
from tests.training.runs import QUIET, make_mulan, make_trainer

BATCH = 8  # pairs of a step, over all processes
SCENARIOS: dict[str, dict[str, Any]] = {
    "upstream's defaults": dict(
        optimizer=None, weight_decay=0, schedule="constant", warmup_steps=0, ema_decay=None,
        grad_accum_every=1,
    ),
    "AdamW, average, accumulation": {},
    "gradient caching, activation checkpointing, sigmoid": dict(
        grad_cache_chunk=3, activation_checkpointing=True,
    ),
}  # fmt: skip


def trainer_of(folder: Path, name: str, processes: int, resume: bool = False) -> MuLaNTrainer:
    """In float64, so that equal means equal; nothing of the model's is drawn at random."""
    sigmoid = name.endswith("sigmoid")
    mulan = make_mulan(dropout=0.0, audio=QUIET, sigmoid_contrastive_loss=sigmoid).double()
    return make_trainer(
        folder / name, mulan=mulan, resume=resume, batch_size=BATCH // processes, valid_rows=5,
        **SCENARIOS[name],
    )  # fmt: skip


def main(folder: Path) -> None:
    """Every scenario, in two sittings."""
    torch.set_num_threads(1)
    for name in SCENARIOS:
        trainer = trainer_of(folder, name, 2)
        for _ in range(4):
            trainer.train_step()
        trainer_of(folder, name, 2, resume=True).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
