"""The C++ kernel of csrc/geglu_norm for CPU tensors in float32, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension


def available() -> tuple[bool, str]:
    """Whether the compiled library is loaded, and why not."""
    return _extension.load(), _extension.why_missing()


def supports(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    if x.device.type != "cpu":
        return False, f"it runs on CPU tensors, not {x.device.type}"
    for name, tensor in (("x", x), ("gamma", gamma), ("beta", beta)):
        if tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return False, f"it takes float32, and {name} is {dtype}"
    if gamma.shape[0] == 0:
        return False, "there is no hidden unit"
    if torch._C._are_functorch_transforms_active():
        return False, "torch.func transforms need the torch backend"
    return True, ""


def run(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Call the kernel on rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    op = torch.ops.musiclm_fast.geglu_norm_forward
    out: Tensor = op(rows, gamma.contiguous(), beta.contiguous())[0]
    return out.view(*x.shape[:-1], x.shape[-1] // 2)


def _fake_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty(rows, width // 2), x.new_empty(rows), x.new_empty(rows)


def _fake_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    op = torch.ops.musiclm_fast.geglu_norm_backward
    found = op(grad.contiguous(), *ctx.saved_tensors)
    return tuple(g if needed else None
                 for g, needed in zip(found, ctx.needs_input_grad, strict=True))  # fmt: skip


if _extension.load():
    torch.library.register_fake("musiclm_fast::geglu_norm_forward")(_fake_forward)
    torch.library.register_fake("musiclm_fast::geglu_norm_backward")(_fake_backward)
    torch.library.register_autograd(
        "musiclm_fast::geglu_norm_forward", _backward, setup_context=_setup_context
    )
