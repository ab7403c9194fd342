"""What a parity check of the gated unit and its norm needs: random arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def geglu_norm_inputs(
    batch: tuple[int, ...],
    hidden: int,
    padded: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments for :func:`musiclm_fast.ops.geglu_norm`; all require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(device=device, dtype=dtype).requires_grad_()

    return dict(x=normal(*batch, 2 * padded), gamma=normal(hidden), beta=normal(hidden))
