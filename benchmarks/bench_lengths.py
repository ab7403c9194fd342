"""Clips of different lengths in one batch, against clips of equal length with the same total.

``python -m benchmarks.bench_lengths`` runs the audio tower (mulan front end), forward and backward
in training mode, on clips of 1, 3, ..., 29 s (``--every 2``): as the tower groups them, padded to
the longest (``--padded``), and with all clips of the mean length. Embeddings are first compared
with those of single clips.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import AudioSpectrogramTransformer
from musiclm_fast.models import audio_tower as audio

RATE = 16_000
QUICK = False  # not part of `make bench`; ask for it by name


def step(tower: torch.nn.Module, clips: list[Tensor], spread: float) -> Callable[[], Any]:
    """A forward and backward pass; lengths that differ by more than ``spread`` run apart."""

    def run() -> Tensor:
        audio._SPREAD, before = spread, audio._SPREAD
        try:
            tower.zero_grad(set_to_none=True)
            out = tower(clips)
            out.square().sum().backward()
            return out.detach()
        finally:
            audio._SPREAD = before

    return run


def check(tower: torch.nn.Module, clips: list[Tensor]) -> None:
    """A clip's embedding does not depend on the rest of its batch.

    Raises:
        AssertionError: it does.
    """
    tower.eval()
    with torch.no_grad():
        alone = torch.cat([tower(clip[None]) for clip in clips])
        torch.testing.assert_close(tower(clips), alone)
    tower.train()


def results(settings: Settings) -> list[Result]:
    """15 clips of 1, 3, ..., 29 s against 15 of 15 s; padded ones too in full mode."""
    if settings.mode == "gpu":
        return []
    torch.manual_seed(0)
    sizes = settings.pick(dict(dim=128, depth=2), full=dict(dim=512, depth=6),
                          tiny=dict(dim=64, depth=1))  # fmt: skip
    tower = AudioSpectrogramTransformer(**sizes, front_end="mulan", patch_dropout_prob=0.0)
    seconds = range(1, settings.pick(30, tiny=4), 2)
    different = [torch.randn(RATE * length) for length in seconds]
    equal = [torch.randn(RATE * sum(seconds) // len(seconds)) for _ in seconds]
    contenders = {
        "ours": Contender(lambda: step(tower, different, audio._SPREAD), role="ours"),
        "equal lengths": Contender(lambda: step(tower, equal, audio._SPREAD), role="bound"),
    }
    if settings.mode == "full":
        contenders["padded to the longest"] = Contender(lambda: step(tower, different, 0.0))
    return harness.measure(
        "clips of different lengths, forward and backward",
        f"{len(seconds)} clips of 1 to {max(seconds)} s, dim {sizes['dim']}",
        contenders, settings, check=functools.partial(check, tower, different[:4]), rounds=3,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=2, help="seconds from one length to the next")
    parser.add_argument("--padded", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    tower = AudioSpectrogramTransformer(
        dim=arguments.dim, depth=arguments.depth, front_end="mulan", patch_dropout_prob=0.0
    )
    seconds = range(1, 31, arguments.every)
    different = [torch.randn(RATE * length) for length in seconds]
    equal = [torch.randn(RATE * sum(seconds) // len(seconds)) for _ in seconds]
    tower.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            tower(different[:4]), torch.cat([tower(c[None]) for c in different[:4]])
        )
    tower.train()
    contenders = {
        "equal": step(tower, equal, audio._SPREAD),
        "different": step(tower, different, audio._SPREAD),
    }
    if arguments.padded:
        contenders["padded"] = step(tower, different, 0.0)
    times = harness.interleave(contenders, arguments.rounds)
    print(harness.environment())
    for name, timing in times.items():
        costs, least, most = harness.ratio(timing, times["equal"])
        print(f"{name:10} {timing.median:7.2f} s, {costs:.2f} ({least:.2f} to {most:.2f}) of equal")


if __name__ == "__main__":
    main()
