"""The C++ kernels for CPU tensors (csrc/contrastive)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.contrastive import _autograd

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(*, audio: Tensor, **_: Any) -> tuple[bool, str]:
    """Whether the kernels take this call, from device and dtype alone, and why not."""
    return _compiled.supports(audio, "cpu", _DTYPES)


def run(*, audio: Tensor, text: Tensor, **rest: Any) -> Tensor:
    """The loss by the kernels."""
    return _autograd.loss(kernels, prepare(audio), prepare(text), **rest)


def prepare(latents: Tensor) -> Tensor:
    """Latents as the kernels read them: float32 or bfloat16, rows contiguous."""
    if latents.dtype == torch.float16:
        latents = latents.float()
    return latents if latents.stride(-1) == 1 else latents.contiguous()


if _extension.load():
    kernels = _autograd.register(
        "musiclm_fast::contrastive_logsumexp",
        "musiclm_fast::contrastive_logsumexp_backward",
        "musiclm_fast::contrastive_sigmoid",
    )
