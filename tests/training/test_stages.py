"""The stages' trainers are tasks of the engine: resumed bit for bit, named options, their files."""

from __future__ import annotations

import inspect
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast.audiolm import (
    CoarseTransformer,
    CoarseTransformerTrainer,
    MelCodec,
    MelKmeans,
    SemanticTransformer,
    SemanticTransformerTrainer,
)
from musiclm_fast.models.checkpoint import CheckpointError
from tests.audiolm.test_conditioning import make_quantizer
from tests.audiolm.test_tokenizers import RATE, notes

SIZES: dict[str, Any] = dict(
    dim=32, depth=1, heads=2, dim_head=16, audio_text_condition=True, attn_dropout=0.1,
    ff_dropout=0.1,
)  # fmt: skip


class Crops(Dataset[Tensor]):
    """Clips that are cropped at random, by all three generators."""

    def __init__(self, clips: list[Tensor]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor:
        start = int(torch.randint(1000, ())) + random.randrange(1000)
        return self.clips[index][start : start + 5000]


@pytest.fixture(scope="module")
def clips() -> list[Tensor]:
    return notes(12, 0.5)


@pytest.fixture(scope="module")
def parts(clips: list[Tensor]) -> tuple[MelKmeans, MelCodec]:
    return (
        MelKmeans(codebook_size=12).fit(clips),
        MelCodec(num_quantizers=4, codebook_size=10).fit(clips),
    )


def make(kind: str, parts: Any, clips: list[Tensor], folder: Path, **options: Any) -> Any:
    tokenizer, codec = parts
    torch.manual_seed(0)
    random.seed(0)  # which stream a hyper-connection starts on
    defaults: dict[str, Any] = dict(
        num_train_steps=8, batch_size=3, lr=1e-2, schedule="cosine", warmup_steps=2, wd=0.1,
        grad_accum_every=2, save_model_every=3, save_results_every=4, valid_frac=0.25,
        accelerate_kwargs={"cpu": True}, results_folder=folder, dataset=Crops(clips),
        audio_conditioner=make_quantizer(),
    )  # fmt: skip
    options = {**defaults, **options}
    if kind == "semantic":
        stage = SemanticTransformer(**SIZES, num_semantic_tokens=12)
        return SemanticTransformerTrainer(tokenizer, stage, **options)
    coarse = CoarseTransformer(
        **SIZES, num_semantic_tokens=12, codebook_size=10, num_coarse_quantizers=2
    )
    return CoarseTransformerTrainer(coarse, codec, tokenizer, **options)


@pytest.mark.parametrize("kind", ["semantic", "coarse"])
def test_resumed_equals_uninterrupted(kind: str, parts: Any, clips: Any, tmp_path: Path) -> None:
    """Stopped at step 5, resumed from step 3, with all generators elsewhere: the same bits."""
    whole = make(kind, parts, clips, tmp_path / "whole")
    whole.train()
    stopped = make(kind, parts, clips, tmp_path / "parts")
    for _ in range(5):
        stopped.train_step()
    torch.manual_seed(99)
    random.seed(99)
    resumed = make(kind, parts, clips, tmp_path / "parts", resume=True)
    assert resumed.step == 3
    resumed.train()
    for a, b in zip(whole.trained_parameters, resumed.trained_parameters, strict=True):
        assert torch.equal(a, b)
    name = f"{kind}.transformer.8.pt"
    ours, theirs = (
        torch.load(tmp_path / run / name, weights_only=True)["training"]
        for run in ("whole", "parts")
    )
    assert torch.equal(ours["random"][0]["torch"], theirs["random"][0]["torch"])
    assert ours["random"][0]["python"] == theirs["random"][0]["python"]
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == sorted(
        [f"{kind}.transformer.{step}.pt" for step in (3, 6, 8)]
        + [f"{kind}.latest", f"{kind}.best", f"{kind}.log.jsonl"]
    )
    lines = (tmp_path / "parts" / f"{kind}.log.jsonl").read_text().splitlines()
    losses = [(e["step"], e["train_loss"]) for e in map(json.loads, lines) if "train_loss" in e]
    assert [step for step, _ in losses] == list(range(1, 9))
    assert all(math.isfinite(loss) for _, loss in losses)


def test_a_file_of_an_earlier_version_goes_on(parts: Any, clips: Any, tmp_path: Path) -> None:
    """It holds one generator and no options."""
    first = make("semantic", parts, clips, tmp_path)
    for _ in range(3):
        first.train_step()
    path = tmp_path / "semantic.transformer.3.pt"
    package = torch.load(path, weights_only=True)
    package["rng"] = package.pop("training")["random"][0]["torch"]
    torch.save(package, tmp_path / "old.pt")
    second = make("semantic", parts, clips, tmp_path / "other")
    second.load(tmp_path / "old.pt")
    assert second.step == 3
    assert second.optim.param_groups[0]["lr"] == first.optim.param_groups[0]["lr"]
    assert torch.equal(torch.get_rng_state(), package["rng"])
    for a, b in zip(first.trained_parameters, second.trained_parameters, strict=True):
        assert torch.equal(a, b)


def test_another_run_is_named_by_its_options(parts: Any, clips: Any, tmp_path: Path) -> None:
    make("semantic", parts, clips, tmp_path).train()
    for change, message in (
        (dict(lr=0.5), r"lr = 0\.01, not 0\.5"),
        (dict(wd=0.2), r"weight_decay = 0\.1, not 0\.2"),
        (dict(data_sample_hz=RATE), rf"data_sample_hz = None, not {RATE}"),
    ):
        with pytest.raises(CheckpointError, match=message):
            make("semantic", parts, clips, tmp_path, resume=True, **change)
    with pytest.raises(ValueError, match=r"checkpoints of an earlier run.*resume=True"):
        make("semantic", parts, clips, tmp_path).train_step()
    make("coarse", parts, clips, tmp_path).train_step()  # another stage in the same folder


def test_only_the_newest_and_the_best_stay(parts: Any, clips: Any, tmp_path: Path) -> None:
    trainer = make(
        "semantic", parts, clips, tmp_path, save_model_every=1, save_results_every=1, keep_last=1,
        keep_best=1, num_train_steps=5,
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "semantic.best").exists()
    best = min(trainer.run.scores, key=lambda step: trainer.run.scores[step])
    kept = {int(path.name.split(".")[2]) for path in tmp_path.glob("semantic.transformer.*.pt")}
    assert kept == {5, best}
    none = make(
        "semantic", parts, clips, tmp_path / "none", save_model_every=2, save_results_every=2,
        keep_last=1, keep_best=0, num_train_steps=5,
    )  # fmt: skip
    none.train()
    links = [path for path in (tmp_path / "none").iterdir() if path.is_symlink()]
    assert all(link.exists() for link in links)
    assert [path.name for path in (tmp_path / "none").glob("semantic.transformer.*")] == [
        "semantic.transformer.5.pt"
    ]


def test_the_last_step_is_validated(parts: Any, clips: Any, tmp_path: Path) -> None:
    trainer = make(
        "semantic", parts, clips, tmp_path, save_model_every=2, save_results_every=3,
        num_train_steps=4,
    )  # fmt: skip
    trainer.train()
    assert set(trainer.run.scores) == {4}
    trainer.train()  # nothing is left to do
    saved = (tmp_path / "semantic.transformer.4.pt").stat().st_mtime_ns
    again = make(
        "semantic", parts, clips, tmp_path, save_model_every=2, save_results_every=3,
        num_train_steps=4, resume=True,
    )  # fmt: skip
    again.train()
    assert (tmp_path / "semantic.transformer.4.pt").stat().st_mtime_ns == saved


def test_bf16(parts: Any, clips: Any, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    trainer = make(
        "semantic", parts, clips, tmp_path, mixed_precision="bf16", accelerate_kwargs={"cpu": True}
    )
    seen = set()
    trainer.transformer.to_logits.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    assert math.isfinite(trainer.train_step()["loss"])
    AcceleratorState._reset_state(True)
    assert seen == {torch.bfloat16}


def test_arguments(parts: Any, clips: Any, tmp_path: Path) -> None:
    found = inspect.signature(SemanticTransformerTrainer).parameters
    for name in ("wd", "save_results_every", "schedule", "mixed_precision", "log_with", "folder"):
        assert name in found
    assert found["lr"].default == 3e-4
    assert found["batch_size"].default is inspect.Parameter.empty
    for options, error, message in (
        (dict(bathc_size=3), TypeError, "bathc_size"),
        (dict(lr=0.0), ValueError, r"^lr: got 0\.0, expected above 0"),
        (dict(wd=-1.0), ValueError, r"^wd: got -1\.0"),
        (dict(wd=0.1, weight_decay=0.2), TypeError, "wd.*weight_decay"),
        (dict(save_results_every=0), ValueError, r"^save_results_every: got 0"),
        (dict(batch_size=None), ValueError, r"^batch_size: got None"),
        (dict(num_train_steps="9"), ValueError, r"^num_train_steps: got '9' \(str\)"),
        (dict(schedule="step"), ValueError, "^schedule: got 'step', expected one of"),
        (dict(use_wandb_tracking=True), ValueError, "use_wandb_tracking"),
    ):
        with pytest.raises(error, match=message):
            make("semantic", parts, clips, tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
