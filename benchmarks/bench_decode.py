"""One token through all layers (dim 512, depth 6, cross attention), in float32 on the CPU.

Parity with the reference is checked first. Then the C++ kernel and the torch path are interleaved
on one thread, for 1, 2, 8 and 16 rows with 64 and 1,024 tokens in the cache. The bound is the time
to read the packed weights and the cache once, at the rate at which this machine sums as much memory
in the same rounds. Counted: 4 bytes per weight and per cached key and value; 2 operations per
weight and row, and 4 per row, head, key and unit of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import testing
from musiclm_fast.audiolm.decoder import decode_weights
from musiclm_fast.audiolm.transformer import Transformer
from musiclm_fast.ops import decode
from musiclm_fast.ops.decode import DecodeWeights

DEPTH, HEADS, DIM_HEAD, CONTEXTS = 6, 8, 64, 9


FLOATS = ("x", "keys_values", "context", "bias_table")


def make_transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        dim=512, depth=DEPTH, heads=HEADS, dim_head=DIM_HEAD, cross_attend=True
    ).eval()


def make_call(rows: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return dict(
        x=normal(rows, 512),
        keys_values=normal(DEPTH, 2, rows, length + 1, DIM_HEAD),
        length=length,
        context=normal(DEPTH, 2, rows, CONTEXTS, DIM_HEAD),
        bias_table=normal(HEADS, 2 * length + 3),
        q_code=torch.tensor([length], dtype=torch.int32),
        k_codes=torch.arange(length + 1, dtype=torch.int32),
    )


def check(weights: DecodeWeights) -> None:
    """Both backends against the float64 reference, by the tolerance rule."""
    call = make_call(4, 100)
    transformer = make_transformer().double()
    wide = {n: v.double() if n in FLOATS else v for n, v in call.items()}
    with torch.no_grad():
        results = [decode(weights=weights, backend=name, **call) for name in ("cpp", "torch")]
        oracle = decode(weights=decode_weights(transformer), backend="torch", **wide)
    testing.assert_close_to_oracle("decode", *results, oracle)


@torch.no_grad()
def results(settings: Settings) -> list[Result]:
    """Rows and cached tokens, on one thread."""
    if settings.mode == "gpu":
        return []
    weights = decode_weights(make_transformer())
    decode(weights=weights, backend="cpp", **make_call(1, 8))  # packs the weights
    sizes = [(1, 64), (1, 1024), (8, 64), (8, 1024)]
    full = [(rows, length) for rows in (1, 2, 8, 16) for length in (64, 1024)]
    found = []
    with harness.one_thread():
        for rows, length in settings.pick(sizes, full=full, tiny=[(2, 8)]):
            call = make_call(rows, length)

            def step(backend: str, call: dict[str, Any] = call) -> Callable[[], Any]:
                return lambda: decode(weights=weights, backend=backend, **call)

            packed = weights.packed["cpp"][0]
            cost = dict(
                operations=2.0 * packed.numel() * rows
                + 4.0 * DEPTH * rows * HEADS * DIM_HEAD * (length + 1),
                traffic=4.0 * (packed.numel() + call["keys_values"].numel()),
            )
            contenders = {
                "ours": Contender(functools.partial(step, "cpp"), role="ours", **cost),
                "torch, the definition": Contender(functools.partial(step, "torch"), **cost),
                "the sum of the weights": Contender(
                    lambda packed=packed: packed.sum, traffic=4.0 * packed.numel(), role="bound"
                ),
            }
            found += harness.measure(
                "one token through all layers, 1 thread", f"{rows} rows, {length} tokens",
                contenders, settings, check=functools.partial(check, weights),
                rounds=settings.pick(7, full=15), axes={"rows": rows} if length == 64 else {},
            )  # fmt: skip
    return found
