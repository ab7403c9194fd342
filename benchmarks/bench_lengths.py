"""Clips of different lengths in one batch, against as many seconds in clips of equal length.

``python -m benchmarks.bench_lengths`` runs the audio tower (mulan front end), forward and backward
in training mode, on clips of 1, 3, ..., 29 s (``--every 2``): as the tower runs them, padded to the
longest (``--padded``), and with all clips as long as their mean. Embeddings are compared with those
of clips alone first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from musiclm_fast import AudioSpectrogramTransformer
from musiclm_fast.models import audio

RATE = 16_000


def step(tower: torch.nn.Module, clips: list[Tensor], spread: float) -> Callable[[], Any]:
    """A forward and backward pass; clips that differ by more than ``spread`` run apart."""

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
