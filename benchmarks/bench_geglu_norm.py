"""GEGLU and the norm after it, forward and backward: 2 x 1,024 tokens, hidden 1,365 of 1,376.

    python -m benchmarks.bench_geglu_norm

Gradients are compared with the float64 definition first. Then, in turn and on one thread: the C++
kernel, the torch path on the padded width, and the bound: a copy of as much memory. Counted: x
twice, its gradient, the output and its gradient.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
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


def main() -> None:
    torch.set_num_threads(1)
    small = make(64)
    results = [
        step(call, backend)()
        for call, backend in (
            (small, "cpp"), (small, "torch"), (testing.to_float64(small), "torch"),
        )
    ]  # fmt: skip
    for name, value in results[0].items():
        testing.assert_close_to_oracle(name, value, results[1][name], results[2][name])

    tokens = 2048
    inputs = make(tokens)
    values = tokens * PADDED * 8
    source = torch.randn(values // 2)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "cpp": step(inputs, "cpp"),
        "torch": step(inputs, "torch"),
        "copy": lambda: target.copy_(source),
    }
    times = harness.interleave(runs, rounds=7, warmup=2)
    print(
        json.dumps(
            {
                "cpp_ms": 1e3 * times["cpp"].median,
                "torch_ms": 1e3 * times["torch"].median,
                "torch / cpp": harness.ratio(times["torch"], times["cpp"]),
                "GB/s": 4 * values / times["cpp"].median / 1e9,
                "bound_ms": 1e3 * times["copy"].median,
                **harness.environment(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
