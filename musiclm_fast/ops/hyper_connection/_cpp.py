"""The C++ kernel of csrc/hyper_connection for CPU tensors in float32, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.hyper_connection import _autograd


def supports(streams: Tensor, **others: Tensor | None) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    return _compiled.supports(streams, "cpu", (torch.float32,), **others)


def run(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run the op on arguments that :func:`supports` accepts."""
    return _autograd.run(torch.ops.musiclm_fast.hyper_connection_forward, **arguments)


if _extension.load():
    _autograd.register()
