"""Residual streams, forward and backward: the training step's 2 x 1,024 tokens, 4 streams, dim 512.

    python -m benchmarks.bench_hyper_connection

Loss and gradients are compared with the float64 definition first. Then, in turn and on one thread:
the C++ kernel, the torch path, and the bound: a copy of as much memory. Counted: the streams, the
branch's input and output and their gradients, each read or written once in each direction.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from musiclm_fast import testing
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

    inputs = make(2048)
    rows = 2048 * DIM
    values = rows * (STREAMS + 1) * 2 + rows * ((STREAMS + 1) * 3)  # forward, backward
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
