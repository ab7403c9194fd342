"""GEGLU and the norm after it, forward and backward: 2 x 1,024 tokens, hidden 1,365 of 1,376.

Gradients are compared with the float64 reference first. Then, interleaved on one thread: the C++
kernel, the torch path on the padded width, and the bound: a copy of as much memory. Counted: x
twice, its gradient, the output and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Result, Settings
from musiclm_fast import testing
from musiclm_fast.ops import geglu_norm

HIDDEN, PADDED = 1365, 1376


def make(tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(tokens, 2 * PADDED), gamma=(HIDDEN,), beta=(HIDDEN,))
    return {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}


def step(inputs: dict[str, Tensor], backend: str) -> Callable[[], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (inputs["x"].shape[0], PADDED)
    grad = torch.randn(shape, generator=generator).to(inputs["x"].dtype)

    def run() -> dict[str, Tensor]:
        return testing.gradients(geglu_norm(**inputs, backend=backend), inputs, grad)

    return run


def results(settings: Settings) -> list[Result]:
    """The training step's 2,048 tokens, on one thread."""
    if settings.mode == "gpu":
        return []
    tokens = settings.pick(2048, tiny=64)
    return harness.measure_against_copy(
        "GEGLU and its norm, forward and backward, 1 thread", f"{tokens:,} tokens",
        step, make(tokens), make(64), tokens * PADDED * 8, settings,
        headline="GEGLU and its norm, 2 x 1,024 tokens, forward and backward",
    )  # fmt: skip
