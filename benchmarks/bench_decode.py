"""One token through all layers (dim 512, depth 6, cross attention), in float32 on the CPU.

    python -m benchmarks.bench_decode            # the table
    python -m benchmarks.bench_decode --quick

Parity with the definition first. Then, in turn and on one thread: the C++ kernel and the torch
path for 1, 2, 8 and 16 rows with 64 and 1,024 tokens in the cache. Beside them stands the bound:
the time to read the packed weights and the cache once at the rate at which this machine, in the
same rounds, sums as much memory. Counted: 4 bytes per weight and per cached key and value; 2
operations per weight and row, and 4 per row, head, key and unit of a head.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from musiclm_fast import testing
from musiclm_fast.audiolm.layers import Transformer
from musiclm_fast.audiolm.step import decode_weights
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
    """Both backends against the definition in float64, by the tolerance rule."""
    call = make_call(4, 100)
    transformer = make_transformer().double()
    wide = {n: v.double() if n in FLOATS else v for n, v in call.items()}
    with torch.no_grad():
        results = [decode(weights=weights, backend=name, **call) for name in ("cpp", "torch")]
        oracle = decode(weights=decode_weights(transformer), backend="torch", **wide)
    testing.assert_close_to_oracle("decode", *results, oracle)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = decode_weights(make_transformer())
    check(weights)
    packed = weights.packed["cpp"][0]
    rounds = 3 if args.quick else 15
    table = []
    for rows in (2, 16) if args.quick else (1, 2, 8, 16):
        for length in (64, 1024):
            call = make_call(rows, length)

            def step(backend: str, call: dict[str, Any] = call) -> Callable[[], Any]:
                return lambda: decode(weights=weights, backend=backend, **call)

            runs = {"cpp": step("cpp"), "torch": step("torch"), "read": packed.sum}
            with torch.no_grad():
                times = harness.interleave(runs, rounds=rounds, warmup=2)
            cached = call["keys_values"].numel()
            bytes_read = 4 * (packed.numel() + cached)
            rate = 4 * packed.numel() / times["read"].median
            operations = 2 * packed.numel() * rows
            operations += 4 * DEPTH * rows * HEADS * DIM_HEAD * (length + 1)
            seconds = times["cpp"].median
            table.append(
                {
                    "rows": rows,
                    "length": length,
                    "cpp_ms": 1e3 * seconds,
                    "torch_ms": 1e3 * times["torch"].median,
                    "torch / cpp": harness.ratio(times["torch"], times["cpp"]),
                    "GB/s": bytes_read / seconds / 1e9,
                    "GFLOP/s": operations / seconds / 1e9,
                    "bound_ms": 1e3 * bytes_read / rate,
                }
            )
    print(json.dumps({"table": table, **harness.environment()}, indent=1))


if __name__ == "__main__":
    main()
