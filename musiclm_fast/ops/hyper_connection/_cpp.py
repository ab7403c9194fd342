"""The C++ kernel of csrc/hyper_connection for CPU tensors in float32, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension


def available() -> tuple[bool, str]:
    """Whether the compiled library is loaded, and why not."""
    return _extension.load(), _extension.why_missing()


def supports(streams: Tensor, **others: Any) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    if streams.device.type != "cpu":
        return False, f"it runs on CPU tensors, not {streams.device.type}"
    for name, x in (("streams", streams), *others.items()):
        if isinstance(x, Tensor) and x.dtype != torch.float32:
            dtype = str(x.dtype).removeprefix("torch.")
            return False, f"it takes float32, and {name} is {dtype}"
    if torch._C._are_functorch_transforms_active():
        return False, "torch.func transforms need the torch backend"
    return True, ""


def run(
    streams: Tensor, beta: Tensor | None, branch: Tensor | None, weights: Tensor, scales: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Call the kernel on ``(N, s, dim)``."""
    *batch, count, dim = streams.shape
    branch_input, mixed, beta_out, _, _ = torch.ops.musiclm_fast.hyper_connection_forward(
        streams.reshape(-1, count, dim).contiguous(),
        None if beta is None else beta.reshape(-1, count).contiguous(),
        None if branch is None else branch.reshape(-1, dim).contiguous(),
        weights.t().contiguous(), scales.contiguous(), offsets.contiguous(),
    )  # fmt: skip
    return (
        branch_input.view(*batch, dim),
        mixed.view(*batch, count, dim),
        beta_out.view(*batch, count),
    )


def _fake_forward(streams: Tensor, *_: Any) -> tuple[Tensor, ...]:
    tokens, count, dim = streams.shape
    return (
        streams.new_empty(tokens, dim),
        streams.new_empty(tokens, count, dim),
        streams.new_empty(tokens, count),
        streams.new_empty(tokens, count, count + 2),
        streams.new_empty(tokens, count),
    )


def _fake_backward(
    grad_input: Tensor, grad_mixed: Tensor, grad_beta: Tensor, streams: Tensor,
    beta: Tensor | None, branch: Tensor | None, *parameters: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    none = streams.new_empty(0)
    return (
        torch.empty_like(streams),
        none if beta is None else torch.empty_like(beta),
        streams.new_empty(0) if branch is None else torch.empty_like(branch),
        *(torch.empty_like(p) for p in parameters[:3]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[3:])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    found = torch.ops.musiclm_fast.hyper_connection_backward(
        *(grad.contiguous() for grad in grads[:3]), *ctx.saved_tensors
    )
    return tuple(g if needed else None
                 for g, needed in zip(found, ctx.needs_input_grad, strict=True))  # fmt: skip


if _extension.load():
    torch.library.register_fake("musiclm_fast::hyper_connection_forward")(_fake_forward)
    torch.library.register_fake("musiclm_fast::hyper_connection_backward")(_fake_backward)
    torch.library.register_autograd(
        "musiclm_fast::hyper_connection_forward", _backward, setup_context=_setup_context
    )
