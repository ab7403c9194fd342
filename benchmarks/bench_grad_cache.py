"""Gradient caching: a step of 1,024 one-second clips in the memory of a step of 64.

MuLaN (dim 512, depth 6, the ``"mulan"`` log-mel front end at 16 kHz, texts of 32 tokens, training
mode) on the CPU: peak memory beyond the model and its batch, and time, each step once in its own
process. The cached step of 16 chunks of 64 should need no more memory than the plain step of 64
clips, except for the latents. In quick mode dim 128, depth 2.

Loss and gradients of the cached step are compared with the plain step's first, in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Result, Settings

QUICK = False  # not part of `make bench`; ask for it by name
HZ, TOKENS = 16_000, 32


def make(dim: int, depth: int) -> Any:
    from musiclm_fast import AudioSpectrogramTransformer, MuLaN, TextTransformer

    torch.manual_seed(0)
    size = dict(dim=dim, depth=depth, heads=max(dim // 64, 1), dim_head=64)
    audio = AudioSpectrogramTransformer(**size, front_end="mulan")
    return MuLaN(audio, TextTransformer(num_tokens=20_000, **size)).train()


def batch_of(clips: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(clips)
    wavs = torch.randn(clips, HZ, generator=generator)
    return wavs, torch.randint(1, 20_000, (clips, TOKENS), generator=generator)


def step(model: Any, wavs: Tensor, texts: Tensor, chunk: int | None) -> Tensor:
    from musiclm_fast.training.grad_cache import cached_step

    torch.manual_seed(1)
    if chunk is not None:
        return cached_step(model, wavs, texts, chunk_size=chunk)
    loss: Tensor = model(wavs, texts)
    loss.backward()
    return loss.detach()


def check_parity() -> None:
    """Raise unless chunks of 3 give the gradients of 8 clips at once.

    Raises:
        AssertionError: naming the parameter.
    """
    model = make(64, 2).double()
    wavs, texts = batch_of(8)
    found = []
    for chunk in (None, 3):
        model.zero_grad()
        loss = step(model, wavs.double(), texts, chunk)
        found.append({"loss": loss, **{n: p.grad.clone() for n, p in model.named_parameters()}})
    for name, value in found[0].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def measured(how: str, dim: int, depth: int, clips: int, chunk: int) -> dict[str, float]:
    """Bytes and seconds of one step, plain or cached; call in a fresh process."""
    seconds = 0.0

    def build() -> Callable[[], None]:
        model = make(dim, depth)
        step(model, *batch_of(2), None)  # warms up
        wavs, texts = batch_of(clips)

        def run() -> None:
            nonlocal seconds
            start = time.perf_counter()
            step(model, wavs, texts, chunk if how == "cached" else None)
            seconds = time.perf_counter() - start

        return run

    extra = harness.extra_memory(build)
    return {"bytes": extra, "seconds": seconds}


def results(settings: Settings) -> list[Result]:
    """The plain step of a chunk, and the cached steps of one chunk and of sixteen."""
    if settings.mode == "gpu":
        return []
    dim, depth = settings.pick((128, 2), full=(512, 6), tiny=(64, 2))
    chunk = settings.pick(64, tiny=4)
    check_parity()
    found = []
    for how, clips in (("cached", 16 * chunk), ("cached", chunk), ("plain", chunk)):
        one = harness.in_fresh_process(measured, how, dim, depth, clips, chunk)
        found.append(Result(
            f"MuLaN, dim {dim}, depth {depth}: step of 1 s clips", f"chunks of {chunk}",
            f"{how}, {clips:,} clips", "ours", [one["seconds"]], memory=int(one["bytes"]),
            axes={"clips": clips},
        ))  # fmt: skip
    return found
