"""Attention with a learned offset table on a GPU, against flash attention without any bias.

``python -m benchmarks.bench_attention_gpu`` compares, for each length, forward and backward of

ours, shared       one set of codes for the batch; the backward includes the table's gradient
ours, per sample   codes of its own for each sample, as patch dropout makes them
ours, QK norm      the same with the l2-norm of queries and keys and its learned scales
flash              torch's flash attention without a bias: the ceiling
SDPA + bias        torch's attention with the bias gathered into an (H, N, N) tensor
FlexAttention      compiled, with the table read by its score function

Output and gradients are compared with the float64 reference first: without agreement there is no
row. TFLOP/s count the matrix products of plain attention, 4 B H N^2 D forward and 10 B H N^2 D
backward, for every contender. Runs without a network.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import harness
from musiclm_fast import testing
from musiclm_fast.ops import attention, grid_codes
from musiclm_fast.ops.attention.reference import attention_reference, offset_bias

HEADS, HEAD_DIM, HEIGHT = 8, 64, 16
TOKENS = 32_768  # samples times length, whatever the length
LENGTHS = (512, 1024, 2048)
RESULTS = Path(__file__).resolve().parent / "results"
Inputs = dict[str, Any]


def make_inputs(
    batch: int, length: int, heads: int, device: str, dtype: torch.dtype, per_sample: bool,
    qk_norm: bool,
) -> Inputs:  # fmt: skip
    """Arguments of the op for patches of a grid, a quarter of them dropped where per sample."""
    width = -(-(length * 4 // 3 if per_sample else length) // HEIGHT)
    radius = (HEIGHT - 1) * (2 * width - 1) + width
    inputs = testing.attention_inputs(
        batch, heads, length, head_dim=HEAD_DIM, radius=radius, qk_norm=qk_norm, dtype=dtype,
        device=device,
    )  # fmt: skip
    codes = grid_codes(HEIGHT, width)
    if per_sample:
        generator = torch.Generator().manual_seed(1)
        kept = [torch.randperm(len(codes), generator=generator)[:length] for _ in range(batch)]
        codes = torch.stack([codes[k.sort().values] for k in kept])
    else:
        codes = codes[:length]
    return inputs | dict(q_codes=codes.to(device), k_codes=codes.to(device))


def ours(inputs: Inputs) -> torch.Tensor:
    return attention(**inputs, backend="triton")


def flash(inputs: Inputs) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv = (inputs[name] for name in "qkv")
    if inputs["q"].device.type == "cpu":
        return F.scaled_dot_product_attention(*qkv)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*qkv)


def sdpa_with_bias(inputs: Inputs) -> torch.Tensor:
    bias = offset_bias(inputs["bias_table"], inputs["q_codes"], inputs["k_codes"])
    bias = bias.to(inputs["q"].dtype)
    return F.scaled_dot_product_attention(*(inputs[name] for name in "qkv"), attn_mask=bias)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(inputs: Inputs) -> torch.Tensor:
    table, q_codes, k_codes = (inputs[name] for name in ("bias_table", "q_codes", "k_codes"))
    radius = table.shape[1] // 2

    def score(s: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        offset = (q_codes[i] - k_codes[j]).clamp(-radius, radius)
        return s + table[h, offset + radius]

    return _compiled_flex()(*(inputs[name] for name in "qkv"), score_mod=score)


def check_parity(length: int, device: str, dtype: torch.dtype) -> None:
    """Raise AssertionError where ours is not as exact as the same-dtype torch path."""
    for per_sample in (False, True):
        inputs = make_inputs(2, length, 2, device, dtype, per_sample, qk_norm=per_sample)
        wide = testing.to_float64(inputs)
        grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(2))
        grad = grad.to(device=device, dtype=dtype)
        found = []
        for function, given in (
            (ours, inputs),
            (lambda a: attention_reference(**a, upcast=False), inputs),
            (lambda a: attention_reference(**a), wide),
        ):
            out = function(given)
            found.append({"out": out, **testing.gradients(out, given, grad)})
        for name in found[0]:
            testing.assert_close_to_oracle(name, *(f[name] for f in found), dtype=dtype)


def contenders(batch: int, length: int, heads: int, device: str, dtype: torch.dtype) -> Mapping[
    str, tuple[Callable[[Inputs], torch.Tensor], Inputs]
]:  # fmt: skip
    """Name -> function and its inputs; those that the device cannot run are absent."""
    shared, own, norm = (
        make_inputs(batch, length, heads, device, dtype, *options)
        for options in ((False, False), (True, False), (True, True))
    )
    found = {
        "ours, shared": (ours, shared),
        "ours, per sample": (ours, own),
        "ours, QK norm": (ours, norm),
        "flash": (flash, shared),
        "SDPA + bias": (sdpa_with_bias, shared),
    }
    if device != "cpu":
        found["FlexAttention"] = (flex, shared)
    return found


def measure(
    length: int, tokens: int = TOKENS, heads: int = HEADS, device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16, rounds: int = 7, repeats: int = 10,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one length: name, milliseconds, TFLOP/s and extra memory of both directions."""
    check_parity(length, device, dtype)
    batch = max(tokens // length, 1)
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    memory: dict[str, float] = {}
    for name, (function, inputs) in contenders(batch, length, heads, device, dtype).items():
        grad = torch.randn_like(inputs["q"])
        names = [n for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad]
        leaves = [inputs[n] for n in names if function is not flash or n in "qkv"]
        try:
            memory[name] = _peak(functools.partial(_both, function, inputs, leaves, grad), device)
            out = function(inputs)
        except RuntimeError as error:  # out of memory, or a peer that refuses the shape
            print(f"N={length} {name}: left out, {str(error).splitlines()[0][:120]}")
            continue
        forward[name] = functools.partial(
            _repeat, repeats, functools.partial(_quiet, function, inputs)
        )
        backward[name] = functools.partial(
            _repeat,
            repeats,
            functools.partial(
                torch.autograd.grad, out, leaves, grad, retain_graph=True, allow_unused=True
            ),
        )
    flops = 4 * batch * heads * length**2 * HEAD_DIM
    times = [harness.interleave(f, rounds=rounds, warmup=2) for f in (forward, backward)]
    rows = []
    for name in forward:
        row: dict[str, Any] = dict(length=length, name=name, memory=memory[name])
        for kind, timing, factor in zip(("forward", "backward"), times, (1.0, 2.5), strict=True):
            seconds = timing[name].median / repeats
            row[f"{kind}_ms"] = 1e3 * seconds
            row[f"{kind}_tflops"] = factor * flops / seconds / 1e12
            row[f"{kind}_of_flash"] = timing["flash"].median / timing[name].median
        rows.append(row)
    return rows


def _repeat(times: int, run: Callable[[], Any]) -> None:
    for _ in range(times):
        run()


def _both(
    function: Callable[[Inputs], torch.Tensor], inputs: Inputs, leaves: list[torch.Tensor],
    grad: torch.Tensor,
) -> None:  # fmt: skip
    torch.autograd.grad(function(inputs), leaves, grad, allow_unused=True)


def _quiet(function: Callable[[Inputs], torch.Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        function(inputs)


def _peak(run: Callable[[], Any], device: str) -> float:
    # MiB beyond what is allocated, at most, during a second run: the first one compiles.
    run()
    if device == "cpu":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / harness.MIB


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table, with device, versions, commit and date."""
    lines = [f"- {name}: {value}" for name, value in harness.environment().items()]
    lines += [
        "",
        "| N | | forward ms | TFLOP/s | of flash | backward ms | TFLOP/s | of flash | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            f"{r[f'{kind}_{unit}']:{form}}"
            for kind in ("forward", "backward")
            for unit, form in (("ms", ".3f"), ("tflops", ".1f"), ("of_flash", ".0%"))
        ]
        lines.append(f"| {r['length']} | {r['name']} | {' | '.join(cells)} | {r['memory']:.0f} |")
    return "\n".join(lines) + "\n"


def write(text: str, folder: Path = RESULTS) -> Path:
    """Put the table into ``results/<device>.md``, in place of an older one."""
    folder.mkdir(exist_ok=True)
    device = harness.environment()["device"]
    path = folder / ("".join(c if c.isalnum() else "-" for c in device.lower()) + ".md")
    title = "## Attention with a learned offset table"
    sections = path.read_text().split("\n## ") if path.exists() else [f"# {device}\n"]
    kept = [s for s in sections if not s.startswith(title.removeprefix("## "))]
    path.write_text("\n## ".join([*kept, f"{title.removeprefix('## ')}\n\n{text}"]))
    return path


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_attention_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    text = as_markdown([row for length in LENGTHS for row in measure(length)])
    print(f"\n{text}\nwritten to {write(text)}")


def main() -> None:
    """Measure and print; ``--write`` also puts the table into results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure")
    text = as_markdown([row for length in options.lengths for row in measure(length)])
    print(text)
    if options.write:
        print(f"written to {write(text)}")


if __name__ == "__main__":
    main()
