"""Residual streams, forward and backward: the training step's 2 x 1,024 tokens, 4 streams, dim 512.

Loss and gradients are compared with the float64 reference first. Then, interleaved on one thread:
the C++ kernel, the torch path, and the bound: a copy of as much memory. Counted: the streams, the
branch's input and output and their gradients, each read or written once in each direction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Result, Settings
from musiclm_fast.ops import hyper_connection

STREAMS, DIM = 4, 512


def make(tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return dict(
        streams=normal(tokens, STREAMS, DIM),
        beta=normal(tokens, STREAMS),
        branch=normal(tokens, DIM),
        weights=normal(DIM, STREAMS + 2),
        scales=normal(STREAMS + 2),
        offsets=normal(STREAMS, STREAMS + 2),
    )


def step(inputs: dict[str, Tensor], backend: str) -> Callable[[], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(inputs[name].shape, generator=generator).to(inputs[name].dtype)
        for name in ("branch", "streams", "beta")
    ]

    def run() -> dict[str, Tensor]:
        outputs = hyper_connection(**inputs, backend=backend)
        found = torch.autograd.grad(outputs, list(inputs.values()), grads)
        return dict(zip(inputs, found, strict=True))

    return run


def results(settings: Settings) -> list[Result]:
    """The training step's 2,048 tokens, on one thread."""
    if settings.mode == "gpu":
        return []
    tokens = settings.pick(2048, tiny=64)
    rows = tokens * DIM
    values = rows * (STREAMS + 1) * 2 + rows * ((STREAMS + 1) * 3)  # forward, backward
    return harness.measure_against_copy(
        "residual streams, forward and backward, 1 thread", f"{tokens:,} tokens",
        step, make(tokens), make(64), values, settings,
        headline="residual streams, 2 x 1,024 tokens, forward and backward",
    )  # fmt: skip
