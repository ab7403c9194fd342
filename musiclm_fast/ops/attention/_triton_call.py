"""One call of the attention kernels: its tensors as the kernels read them, and its sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops import _triton_target

# Launch options of kernels without matrix products, and the rows or keys of one of their programs.
SMALL = dict(num_warps=4, num_stages=1)
BLOCK = 64
# Float32 products are exact to float32: no TF32, whatever torch's own setting.
PRECISION = "ieee"
SMALLEST_SCALE = 1e-30
_LOG2E = math.log2(math.e)

Tensors = dict[str, Tensor | None]


def readable(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, q_codes: Tensor | None,
    k_codes: Tensor | None, key_padding_mask: Tensor | None, key_lengths: Tensor | None,
    q_scale: Tensor | None, k_scale: Tensor | None, dropout_seed: Tensor | None,
) -> Tensors:  # fmt: skip
    """A call's tensors in the form that the kernels read, by the names of their arguments."""
    key_mask = _unit_stride(key_padding_mask)
    return dict(
        q=rows(q), k=rows(k), v=rows(v), table=bias_table,
        q_codes=_unit_stride(q_codes), k_codes=_unit_stride(k_codes),
        key_mask=None if key_mask is None else key_mask.view(torch.uint8),
        key_lengths=_unit_stride(key_lengths),
        q_scale=_unit_stride(q_scale), k_scale=_unit_stride(k_scale), seed=dropout_seed,
    )  # fmt: skip


class Call:
    """The sizes and options of a call.

    Args:
        tensors: of :func:`readable`, by name.
        scale: of the similarities.
        causal: whether a query sees no later key.
        dropout_p: probability that a weight is dropped.
    """

    def __init__(self, tensors: Tensors, scale: float, causal: bool, dropout_p: float) -> None:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        assert q is not None and k is not None and v is not None
        self.tensors = tensors
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        self.q, self.k, self.v = q, k, v
        self.device, self.dtype = q.device, q.dtype
        self.group = self.heads // self.kv_heads
        self.block_d = max(16, 1 << (self.head_dim - 1).bit_length())
        self.table = tensors["table"]
        self.radius = 0 if self.table is None else self.table.shape[1] // 2
        self.q_codes, self.k_codes = tensors["q_codes"], tensors["k_codes"]
        self.key_mask, self.key_lengths = tensors["key_mask"], tensors["key_lengths"]
        self.q_scale, self.k_scale = tensors["q_scale"], tensors["k_scale"]
        self.masked = tensors["seed"] is not None or self.key_mask is not None
        self.scale, self.causal, self.dropout_p = scale, causal, dropout_p
        # The table is divided by it. Below the smallest, products do not count beside any bias.
        self.divisor = scale if abs(scale) >= SMALLEST_SCALE else SMALLEST_SCALE

    def numbers(self) -> dict[str, Any]:
        """Arguments that the kernels of the forward and of the backward share."""
        on_amd = _triton_target.family(_triton_target.target(self.device)) == "amd"
        return dict(
            stride_qcb=batch_stride(self.q_codes), stride_kcb=batch_stride(self.k_codes),
            stride_maskb=batch_stride(self.key_mask), **strides("v", self.v.stride(), "bhn"),
            heads=self.heads, queries=self.queries, keys=self.keys, radius=self.radius,
            scale_log2=self.divisor * _LOG2E,
            threshold=int(self.dropout_p * 2**32) - 2**31,
            keep_factor=1.0 / (1.0 - self.dropout_p),
            HEAD_DIM=self.head_dim, BLOCK_D=self.block_d, GROUP=self.group, CAUSAL=self.causal,
            PRECISION=PRECISION,
            PTX=not (on_amd or _triton_target.INTERPRET),  # whether NVIDIA's instructions may occur
        )  # fmt: skip


def rows(x: Tensor) -> Tensor:
    """``(B, H, N, D)`` with contiguous rows, 128 of which fit into 32-bit offsets."""
    stride = x.stride()
    if stride[3] == 1 and abs(stride[2]) < 2**23:
        return x
    return x.contiguous()


def round_up(value: int, multiple: int) -> int:
    """The next multiple, or the value if it is one."""
    return -(-value // multiple) * multiple


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def batch_stride(x: Tensor | None) -> int:
    """Elements from one sample to the next; 0 where all share one row."""
    return x.stride(0) if x is not None and x.ndim == 2 else 0


def strides(name: str, values: Sequence[int], axes: str) -> dict[str, int]:
    """A tensor's first strides as the kernels name them: ``stride_qb``, ``stride_qh``, ..."""
    return {f"stride_{name}{axis}": value for axis, value in zip(axes, values, strict=False)}


def contiguous(shape: Sequence[int]) -> tuple[int, int, int]:
    """The first three strides of a ``(B, H, N, D)`` that is stored so."""
    _, heads, length, head_dim = shape
    return heads * length * head_dim, length * head_dim, head_dim
