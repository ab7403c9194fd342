"""What a parity check of the mixing of residual streams needs: random arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hyper_connection_inputs(
    batch: tuple[int, ...],
    streams: int,
    dim: int,
    branch: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for :func:`musiclm_fast.ops.hyper_connection`; all require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(device=device, dtype=dtype).requires_grad_()

    return dict(
        streams=normal(*batch, streams, dim),
        beta=normal(*batch, streams) if branch else None,
        branch=normal(*batch, dim) if branch else None,
        weights=normal(dim, streams + 2),
        scales=normal(streams + 2),
        offsets=normal(streams, streams + 2),
    )
