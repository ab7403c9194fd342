"""Attention on the CPU, forward and backward: the C++ kernel, SDPA with a learned bias that is
materialised, FlexAttention with the learned table, and the reference.

All compute the gradients of q, k, v and the table; the peers gather the bias from the table in each
pass. Operations are those of the seven matrix products. Traffic is q, k, v, the output and their
gradients, read or written once each pass. One large product is timed too: the rate that the
processor reaches. Output and gradients are first compared with the float64 reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import testing
from musiclm_fast.ops import attention, grid_codes, grid_offsets
from musiclm_fast.ops.attention import attention_reference
from musiclm_fast.ops.attention.reference import offset_bias

BATCH, HEADS, HEAD_DIM = 2, 8, 64
# Lengths of whole grids, and 10 s of audio with a quarter of its patches dropped.
GRIDS = {256: (16, 16), 512: (16, 32), 744: (16, 62), 1024: (16, 64), 2048: (16, 128)}


def inputs(length: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """q, k, v and the table of a grid; codes per sample if patches are dropped."""
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
    """Operations of the seven products that a fused forward and backward need."""
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


def flex(q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor, **codes: Tensor) -> Tensor:
    """FlexAttention, whose score function reads the table; it needs torch.compile."""
    radius = bias_table.shape[1] // 2
    q_codes, k_codes = codes["q_codes"], codes["k_codes"]

    def score(s: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        own_q, own_k = (c if c.ndim == 1 else c[b] for c in (q_codes, k_codes))
        offset = (own_q[i] - own_k[j]).clamp(-radius, radius)
        return s + bias_table[h, offset + radius]

    return _compiled_flex()(q, k, v, score_mod=score)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def traffic(length: int, dtype: torch.dtype) -> float:
    """Bytes of q, k, v and out forward; of those, their gradients and out's backward."""
    return 12.0 * BATCH * length * HEADS * HEAD_DIM * dtype.itemsize


FUNCTIONS = {
    "ours": ours,
    "SDPA and learned bias": sdpa,
    "SDPA and learned bias (torch.compile)": sdpa,
    "FlexAttention and learned table": flex,
    "definition": attention_reference,
}


MEASURED = ("ours", "SDPA and learned bias")  # whose memory is compared


def memory(length: int, name: str) -> int:
    """Extra peak memory of a step in bytes, its gradients included; call in a fresh process."""
    step(FUNCTIONS[name], inputs(256))()  # warms up
    return harness.extra_memory(lambda: step(FUNCTIONS[name], inputs(length)))


def contender(name: str, length: int, dtype: torch.dtype, arguments: dict[str, Any]) -> Contender:
    """A step of ``name``."""

    def build() -> Callable[[], Any]:
        function = FUNCTIONS[name]
        return step(torch.compile(function) if "compile" in name else function, arguments)

    measured = dtype == torch.float32 and length >= 744 and name in MEASURED
    return Contender(
        build,
        memory=functools.partial(harness.in_fresh_process, memory, length, name)
        if measured
        else None,
        operations=operations(length),
        traffic=traffic(length, dtype),
        role="ours" if name == "ours" else "peer",
    )


def results(settings: Settings) -> list[Result]:
    """Lengths of whole grids, and 10 s of audio with a quarter of its patches dropped (744)."""
    if settings.mode == "gpu":
        return []
    found = []
    names = settings.pick(["ours", "SDPA and learned bias"], full=list(FUNCTIONS))
    for dtype in settings.pick([torch.float32], full=[torch.float32, torch.bfloat16]):
        for length in settings.pick((256, 744, 1024), full=tuple(GRIDS), tiny=(256,)):
            arguments = inputs(length, dtype)
            contenders = {name: contender(name, length, dtype, arguments) for name in names}
            square = torch.randn(1024, 1024, dtype=dtype)
            contenders["a product of 1,024 x 1,024"] = Contender(
                lambda square=square: lambda: square @ square, operations=2.0 * 1024**3
            )
            short = str(dtype).removeprefix("torch.")
            found += harness.measure(
                "attention", f"N = {length:,}, {short}", contenders, settings,
                check=functools.partial(check_parity, arguments, dtype),
                rounds=settings.pick(5),
                axes={"tokens": length} if dtype == torch.float32 else {},
                headline="attention with the bias's gather and gradient, N = 744 (10 s)"
                if length == 744 and dtype == torch.float32
                else "",
            )  # fmt: skip
    return found
