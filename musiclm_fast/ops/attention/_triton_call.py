"""One call of the attention kernels: its tensors as the kernels read them, and launches."""

from __future__ import annotations

import math
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


class Call:
    """One call's tensors in the form that the kernels read."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, q_codes: Tensor | None,
        k_codes: Tensor | None, key_padding_mask: Tensor | None, key_lengths: Tensor | None,
        q_scale: Tensor | None, k_scale: Tensor | None, dropout_seed: Tensor | None,
        scale: float, causal: bool, dropout_p: float,
    ) -> None:  # fmt: skip
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.keys = k.shape[1:3]
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.device, self.dtype = q.device, q.dtype
        self.group = self.heads // self.kv_heads
        self.block_d = max(16, 1 << (self.head_dim - 1).bit_length())
        self.bias_table = bias_table
        self.radius = 0 if bias_table is None else bias_table.shape[1] // 2
        self.q_codes, self.k_codes = _unit_stride(q_codes), _unit_stride(k_codes)
        self.key_mask = _unit_stride(key_padding_mask)
        if self.key_mask is not None:
            self.key_mask = self.key_mask.view(torch.uint8)
        self.key_lengths = _unit_stride(key_lengths)
        self.q_scale, self.k_scale = _unit_stride(q_scale), _unit_stride(k_scale)
        self.seed, self.dropout_p = dropout_seed, dropout_p
        self.masked = dropout_seed is not None or key_padding_mask is not None
        self.scale, self.causal = scale, causal

    def shared(self, scale: float) -> dict[str, Any]:
        """Arguments that the kernels of the forward and of the backward share.

        Args:
            scale: of the similarities.
        """
        return dict(
            q_codes=self.q_codes, k_codes=self.k_codes,
            key_mask=self.key_mask, key_lengths=self.key_lengths, seed=self.seed,
            stride_qcb=batch_stride(self.q_codes), stride_kcb=batch_stride(self.k_codes),
            stride_maskb=batch_stride(self.key_mask),
            queries=self.queries, keys=self.keys, radius=self.radius,
            scale_log2=scale * _LOG2E,
            threshold=int(self.dropout_p * 2**32) - 2**31,
            keep_factor=1.0 / (1.0 - self.dropout_p),
        )  # fmt: skip

    def normalized(self, x: Tensor, weight: Tensor) -> Tensor:
        """l2norm(x) * weight, rounded to x's dtype: what the products read."""
        batch, heads, length, head_dim = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch(
            "normalize_kernel", batch * heads * -(-length // BLOCK), SMALL,
            x=x, scale=weight, y=y, **strides("x", x, "bhn"), heads=heads, length=length,
            HEAD_DIM=head_dim, BLOCK_D=self.block_d, BLOCK=BLOCK,
        )  # fmt: skip
        return y

    @property
    def ptx(self) -> bool:
        """Whether the kernels may hold NVIDIA's instructions."""
        on_amd = _triton_target.family(_triton_target.target(self.device)) == "amd"
        return not (on_amd or _triton_target.INTERPRET)


def rows(x: Tensor) -> Tensor:
    """``(B, H, N, D)`` with contiguous rows, 128 of which fit into 32-bit offsets."""
    if x.stride(-1) == 1 and abs(x.stride(2)) < 2**23:
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


def strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    """A tensor's strides as the kernels name them: ``stride_qb``, ``stride_qh``, ..."""
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate(axes)}


def launch(name: str, programs: int, options: dict[str, int], **arguments: Any) -> None:
    """Run a kernel; the first call imports them all."""
    from musiclm_fast.ops.attention import _triton_kernels

    _triton_target.launch(getattr(_triton_kernels, name), programs, arguments, options)
