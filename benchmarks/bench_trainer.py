"""A step of MuLaNTrainer with its logging on, against the bare step: the trainer's overhead.

The bare step is forward, backward, clipping of gradients and the optimizer on one fixed batch; the
trainer also draws, collates and checks its batch, logs, and shows its progress. Both train equal
models on the case "README" of bench_training_step (on a GPU batch 64 of 10 s clips), interleaved.
The goal is 3%.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_training_step as bench
from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings

CLIP = 0.5  # norm of the gradients: the trainer's default


def pairs(case: bench.Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a dataset: a clip and its text's ids."""
    given = bench.inputs(case)
    return list(zip(given["wavs"], given["texts"], strict=True))


def trainer(model: torch.nn.Module, case: bench.Case, device: str, folder: Path) -> Any:
    """A trainer on that dataset, over and over, with its log in ``folder``."""
    from musiclm_fast.training.mulan import MuLaNTrainer

    return MuLaNTrainer(
        model, pairs(case), num_train_steps=10**6, batch_size=case.batch, valid_frac=0.0,
        save_model_every=10**6, results_folder=folder, lr=bench.ADAM["lr"],
        betas=bench.ADAM["betas"], max_grad_norm=CLIP,
        accelerate_kwargs=dict(cpu=device == "cpu"),
    )  # fmt: skip


def trained(model: torch.nn.Module, case: bench.Case, device: str) -> Callable[[], Any]:
    """Steps of the trainer."""
    folder = tempfile.TemporaryDirectory()
    made = trainer(model, case, device, Path(folder.name))
    return lambda _folder=folder: made.train_step()  # the folder lives as long as the steps


def bare(model: torch.nn.Module, case: bench.Case, device: str) -> Callable[[], Any]:
    """Steps of the same model without the trainer."""
    given = bench.inputs(case, device)
    update = torch.optim.Adam(model.parameters(), **bench.ADAM, fused=True)

    def run() -> None:
        update.zero_grad(set_to_none=True)
        model(**given).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        update.step()

    return run


def check(case: bench.Case, device: str) -> None:
    """Both reach the same loss after a step without masks and dropout.

    Raises:
        AssertionError: it does not.
    """
    losses = []
    for make in (trained, bare):
        model = bench.build(bench.OURS, case, device)
        model.audio.patch_dropout_prob = 0.0
        model.audio.front_end = dataclasses.replace(model.audio.front_end, freq_mask=0, time_mask=0)
        make(model, case, device)()
        with torch.no_grad():
            losses.append(model.eval()(**bench.inputs(case, device)))
    torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)


def results(settings: Settings) -> list[Result]:
    """The one case of the mode."""
    name, case = next(iter(settings.pick(bench.CASES, tiny=bench.TINY).items()))
    if settings.device == "cuda":
        name, case = "10 s x 64", bench.ON_GPU["10 s x 64"]
    arguments = (case, settings.device)

    def build(make: Callable[..., Callable[[], Any]]) -> Callable[[], Any]:
        return make(bench.build(bench.OURS, *arguments), *arguments)

    contenders = {
        "trainer, with its logging": Contender(functools.partial(build, trained), role="ours"),
        "the bare step": Contender(functools.partial(build, bare), role="bound"),
    }
    return harness.measure(
        "a step of MuLaNTrainer", name, contenders, settings,
        check=functools.partial(check, *arguments), rounds=settings.pick(5),
    )  # fmt: skip
