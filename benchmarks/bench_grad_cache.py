"""Gradient caching: a step of 1,024 one-second clips in the memory of a step of 64.

``python -m benchmarks.bench_grad_cache`` measures MuLaN (dim 512, depth 6, the ``"mulan"`` log-mel
front end at 16 kHz, texts of 32 tokens, training mode) on the CPU: the peak memory that each step
needs beyond the model and its batch, in a process of its own, and its time. The plain step of the
chunk's size is the measure; the cached step of 16 chunks should need no more, but for the latents.

Loss and gradients of the cached step are compared with the plain step's first, in float64: without
agreement there is no row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness

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


def measured(dim: int, depth: int, clips: int, chunk: int | None) -> dict[str, float]:
    """Bytes and seconds of one step; for a process of its own."""
    seconds = 0.0

    def build() -> Callable[[], None]:
        model = make(dim, depth)
        step(model, *batch_of(2), None)  # gradients and libraries are there before
        wavs, texts = batch_of(clips)

        def run() -> None:
            nonlocal seconds
            start = time.perf_counter()
            step(model, wavs, texts, chunk)
            seconds = time.perf_counter() - start

        return run

    extra = harness.extra_memory(build)
    return {"bytes": extra, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--measure", choices=("plain", "cached"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [f"--dim={options.dim}", f"--depth={options.depth}", f"--chunk={options.chunk}"]
    if options.measure:
        chunk = options.chunk if options.measure == "cached" else None
        print(json.dumps(measured(options.dim, options.depth, options.batch, chunk)))
        return
    check_parity()
    facts = harness.environment() | {"dim": options.dim, "depth": options.depth}
    print(json.dumps(facts), flush=True)
    least = None
    for how, clips in (
        ("plain", options.chunk), ("cached", options.chunk), ("cached", options.batch),
    ):  # fmt: skip
        found = harness.in_fresh_process(
            "benchmarks.bench_grad_cache", f"--measure={how}", f"--batch={clips}", *sizes
        )
        least = least or found["bytes"]
        print(
            f"{how:6} step of {clips:5} clips {found['bytes'] / harness.MIB:8.0f} MiB "
            f"({found['bytes'] / least:.2f} of the first) {1e3 * found['seconds'] / clips:8.1f} "
            "ms a clip",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
