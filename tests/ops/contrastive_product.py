# mypy: ignore-errors
"""The product of the contrastive Triton kernels alone: similarities stored, by tiles as there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from musiclm_fast.ops.contrastive import _triton
from musiclm_fast.ops.contrastive._triton_kernels import _load, _product


@triton.jit
def product_kernel(
    x, y, out, rows, columns,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Out (M, N) = x @ y^T: a tile of rows through all columns."""
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    x_tile = _load(x, first, rows, D, 0, D, BLOCK_M, BLOCK_D, True)
    for start in range(0, columns, BLOCK_N):
        y_tile = _load(y, start, columns, D, 0, D, BLOCK_N, BLOCK_D, True)
        column = start + tl.arange(0, BLOCK_N)
        where = out + row[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(where, _product(x_tile, y_tile, PRECISION), mask=mask)


def product(x: torch.Tensor, y: torch.Tensor, config: _triton.Config) -> torch.Tensor:
    """``(M, d)`` by ``(N, d)`` to float32 ``(M, N)``, on the kernels' own path."""
    rows, depth = x.shape
    out = torch.full((rows, len(y)), float("nan"), device=x.device)
    product_kernel[(-(-rows // config.block_m),)](
        x, y, out, rows, len(y), D=depth, BLOCK_D=_triton.padded(depth),
        PRECISION=_triton.PRECISION, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
