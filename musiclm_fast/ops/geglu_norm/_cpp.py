"""The C++ kernel of csrc/geglu_norm for CPU tensors in float32, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.geglu_norm import _autograd


def supports(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    if gamma.shape[0] == 0:
        return False, "there is no hidden unit"
    return _compiled.supports(x, "cpu", (torch.float32,), gamma=gamma, beta=beta)


def run(**arguments: Tensor) -> Tensor:
    """Run the op on arguments that :func:`supports` accepts."""
    return _autograd.run(torch.ops.musiclm_fast.geglu_norm_forward, **arguments)


if _extension.load():
    _autograd.register()
