"""The C++ kernel of csrc/attention for CPU tensors, float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.attention import _autograd

_DTYPES = (torch.float32, torch.bfloat16)
_MAX_SIZE = 2**30  # positions and table entries are 32-bit inside


def supports(q: Tensor, k: Tensor, bias_table: Tensor | None, **_: Any) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    ok, reason = _compiled.supports(q, "cpu", _DTYPES)
    if not ok:
        return False, reason
    if q.shape[-1] == 0:
        return False, "the head dimension is 0"
    sizes = (q.shape[2], k.shape[2], 0 if bias_table is None else bias_table.shape[1])
    if any(size > _MAX_SIZE for size in sizes):
        return False, "a length or the table exceeds 2**30"
    return True, ""


def run(**arguments: Any) -> Tensor:
    """Call the kernel; table and scales go in as float32, in which it computes."""
    for name in ("bias_table", "q_scale", "k_scale"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].float()
    return _autograd.run(torch.ops.musiclm_fast.attention_forward.default, arguments)


if _extension.load():
    _autograd.register("musiclm_fast::attention_forward", "musiclm_fast::attention_backward")
