"""Attention on the CPU: the C++ kernel, SDPA with a materialised learned bias, and the definition.

``python -m benchmarks.bench_attention`` prints one row per case, forward plus backward (gradients
of q, k, v and the table on all sides; the others gather the bias from the table in each pass):
milliseconds, GFLOP/s of the seven matrix products, their share of what one large product reaches
in the same run, and ratios over interleaved rounds. Then the extra peak memory of a fresh process.
Parity is checked first: without it there is no row. As a pytest suite it fails below 1.3 times
SDPA at any length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from musiclm_fast import _extension, testing
from musiclm_fast.ops import attention, grid_codes, grid_offsets
from musiclm_fast.ops.attention import attention_reference
from musiclm_fast.ops.attention.reference import offset_bias

MODULE = "benchmarks.bench_attention"
BATCH, HEADS, HEAD_DIM = 2, 8, 64
# Lengths of whole grids, and 10 s of audio with a quarter of its patches dropped.
GRIDS = {256: (16, 16), 512: (16, 32), 744: (16, 62), 1024: (16, 64), 2048: (16, 128)}


def inputs(length: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """q, k, v and the table of a grid; codes per sample where patches are dropped."""
    generator = torch.Generator().manual_seed(0)
    grid = GRIDS[length]
    codes, columns = grid_codes(*grid), len(grid_offsets(*grid))
    if len(codes) != length:
        kept = [torch.randperm(len(codes), generator=generator)[:length] for _ in range(BATCH)]
        codes = codes[torch.stack(kept).sort(-1).values]
    shape = (BATCH, length, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    arguments = {name: x.transpose(1, 2) for name, x in zip("qkv", (q, k, v), strict=True)}
    arguments["bias_table"] = torch.randn(HEADS, columns, generator=generator)
    for x in arguments.values():
        x.requires_grad_()
    return {**arguments, "q_codes": codes, "k_codes": codes}


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, **codes: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention with the bias as its mask."""
    bias = offset_bias(bias_table, **codes).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def ours(**arguments: Any) -> Tensor:
    """The C++ kernel."""
    return attention(**arguments, backend="cpp")


def operations(length: int) -> float:
    """Of the seven products that a fused forward and backward need."""
    return 7 * 2.0 * BATCH * HEADS * length * length * HEAD_DIM


def step(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Callable[[], Any]:
    """One forward and backward pass."""
    shape = arguments["q"].transpose(1, 2).shape
    grad = torch.randn(shape, dtype=arguments["q"].dtype).transpose(1, 2)
    names = ("q", "k", "v", "bias_table")
    return lambda: torch.autograd.grad(function(**arguments), [arguments[n] for n in names], grad)


def check_parity(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """One head of one sample: output and gradients are as close to float64 as torch's.

    Raises:
        AssertionError: they are not.
    """
    one = {name: x[:1] if x.ndim > 1 else x for name, x in arguments.items()}
    one |= {name: one[name][:, :1] for name in ("q", "k", "v")}
    one = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in one.items()}
    grad = torch.randn(one["q"].shape, generator=torch.Generator().manual_seed(1))
    found = []
    for function, given in (
        (ours, one),
        (lambda **a: attention_reference(**a, upcast=False), one),
        (attention_reference, testing.to_float64(one)),
    ):
        out = function(**given)
        found.append({"out": out, **testing.gradients(out, given, grad)})
    for name in found[0]:
        testing.assert_close_to_oracle(name, *(f[name] for f in found), dtype=dtype)


def compare(
    length: int, rounds: int = 3, dtype: torch.dtype = torch.float32, definition: bool = False
) -> dict[str, float]:
    """One row of the table.

    Raises:
        AssertionError: values disagree.
    """
    arguments = inputs(length, dtype)
    check_parity(arguments, dtype)
    square = torch.randn(1024, 1024)
    runs = {
        "ours": step(ours, arguments),
        "sdpa": step(sdpa, arguments),
        "forward": lambda: ours(**{n: x.detach() for n, x in arguments.items()}),
        "product": lambda: square @ square,
    }
    if definition:
        runs["definition"] = step(attention_reference, arguments)
    times = harness.interleave(runs, rounds)
    faster, least, most = harness.ratio(times["sdpa"], times["ours"])
    rate = operations(length) / min(times["ours"].seconds)
    row = {
        "ms": 1e3 * times["ours"].median,
        "forward ms": 1e3 * times["forward"].median,
        "sdpa ms": 1e3 * times["sdpa"].median,
        "GFLOP/s": rate / 1e9,
        "of product": rate / (2.0 * 1024**3 / min(times["product"].seconds)),
        "faster": faster,
        "least": least,
        "most": most,
    }
    if definition:
        row["than definition"] = harness.ratio(times["definition"], times["ours"])[0]
    return row


def memory(length: int, function: Callable[..., Tensor]) -> int:
    """Extra peak memory of a step in bytes, its gradients included; call in a fresh process."""
    step(function, inputs(256))()  # threads and code pages are there
    return harness.extra_memory(lambda: step(function, inputs(length)))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many threads as the figures are quoted for."""
    if not _extension.load():
        pytest.skip(_extension.why_missing())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("contender", ["ours", "sdpa", "definition"])
@pytest.mark.parametrize("length", [256, 744])
def test_attention(benchmark: Any, length: int, contender: str, two_threads: None) -> None:
    """For pytest-benchmark: forward and backward of each contender."""
    functions = {"ours": ours, "sdpa": sdpa, "definition": attention_reference}
    arguments = inputs(length)
    check_parity(arguments, torch.float32)
    benchmark.pedantic(step(functions[contender], arguments), rounds=3, warmup_rounds=1)
    rate = operations(length) / benchmark.stats["min"]
    benchmark.extra_info["GFLOP/s"] = round(rate / 1e9, 1)


@pytest.mark.parametrize("length", GRIDS)
def test_faster_than_sdpa(length: int, two_threads: None) -> None:
    """Interleaved with SDPA: at least 1.3 times as fast, forward plus backward."""
    row = compare(length)
    print(f"{length}: { ({name: round(value, 2) for name, value in row.items()}) }")
    assert row["faster"] >= 1.3


def test_memory_is_linear(two_threads: None) -> None:
    """From 512 to 2048 keys, four times as many: about four times the memory, not sixteen."""
    extra = [harness.in_fresh_process(MODULE, "--memory", str(n), "ours") for n in (512, 2048)]
    print(f"extra memory: {[round(x / harness.MIB, 1) for x in extra]} MiB")
    assert extra[1] <= 8 * max(extra[0], 4 * harness.MIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(GRIDS))
    parser.add_argument("--memory", nargs=2, metavar=("LENGTH", "WHICH"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    functions = {"ours": ours, "sdpa": sdpa}
    if arguments.memory:
        length, which = arguments.memory
        print(json.dumps(memory(int(length), functions[which])))
        return
    print(harness.environment(), _extension.simd_level())
    for dtype in (torch.float32, torch.bfloat16):
        for length in arguments.lengths:
            if dtype == torch.bfloat16 and length > 1024:
                continue
            definition = dtype == torch.float32 and length < 1024
            row = compare(length, arguments.rounds, dtype, definition)
            figures = "  ".join(f"{name} {value:.2f}" for name, value in row.items())
            print(f"{str(dtype).removeprefix('torch.'):9} N {length:5}  {figures}", flush=True)
    for length in arguments.lengths:
        extra = {
            which: harness.in_fresh_process(MODULE, "--memory", str(length), which)
            for which in functions
        }
        figures = "  ".join(
            f"{which} {size / harness.MIB:.1f} MiB" for which, size in extra.items()
        )
        print(f"extra memory N {length:5}  {figures}", flush=True)


if __name__ == "__main__":
    main()
