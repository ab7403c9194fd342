"""Schema, fake implementation and autograd of a fused attention kernel, once for all backends.

A backend is a pair of ``torch.library`` ops with the schemas below. The C++ library defines
``musiclm_fast::attention_forward`` and ``musiclm_fast::attention_backward`` (csrc/library.cpp
repeats the schemas); Triton defines ``attention_forward_triton`` and
``attention_backward_triton`` in Python. :func:`register` gives either pair its fake
implementations and its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OPTIONS = (
    "Tensor? bias_table, Tensor? q_codes, Tensor? k_codes, Tensor? key_padding_mask, "
    "Tensor? key_lengths, Tensor? q_scale, Tensor? k_scale, Tensor? dropout_seed, "
    "float scale, bool causal, float dropout_p"
)
# out (B, H, M, D), stored as (B, M, H, D); logsumexp of the similarities (B, H, M) float32.
FORWARD_SCHEMA = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)"
# Gradients of q, k, v, bias_table, q_scale, k_scale; of shape (0,) where the input is absent.
BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_TENSORS = (
    "q", "k", "v", "bias_table", "q_codes", "k_codes", "key_padding_mask", "key_lengths",
    "q_scale", "k_scale", "dropout_seed",
)  # fmt: skip
ARGUMENTS = (*_TENSORS, "scale", "causal", "dropout_p")


def run(forward_op: Any, arguments: dict[str, Any]) -> Tensor:
    """Call a forward op with the dispatcher's keyword arguments."""
    out: Tensor = forward_op(*(arguments[name] for name in ARGUMENTS))[0]
    return out


def empty_heads(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape ``(B, H, N, D)``, stored as ``(B, N, H, D)``."""
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    bias_table: Tensor | None, q_codes: Tensor | None, k_codes: Tensor | None,
    key_padding_mask: Tensor | None, key_lengths: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    small = [
        q.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (bias_table, q_scale, k_scale)
    ]
    return (empty_heads(q), empty_heads(k), empty_heads(v), *small)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, logsumexp = output
    tensors = inputs[: len(_TENSORS)]
    ctx.save_for_backward(*tensors, out, logsumexp)
    ctx.options = inputs[len(_TENSORS) :]
    ctx.set_materialize_grads(False)  # or autograd launches a kernel for zeros that nobody reads


def register(forward_name: str, backward_name: str) -> None:
    """Register fakes and autograd for a pair of ops that exist, such as ``"musiclm_fast::x"``."""
    torch.library.register_fake(forward_name)(_fake_forward)
    torch.library.register_fake(backward_name)(_fake_backward)
    namespace, name = backward_name.split("::")
    backward_op = getattr(getattr(torch.ops, namespace), name)

    def backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        q, k, v, *options, out, logsumexp = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dq, dk, dv, d_table, d_q_scale, d_k_scale = backward_op(
            grad_out, q, k, v, out, logsumexp, *options, *ctx.options
        )
        by_name = {
            "q": dq, "k": dk, "v": dv, "bias_table": d_table, "q_scale": d_q_scale,
            "k_scale": d_k_scale,
        }  # fmt: skip
        return tuple(
            by_name[name] if name in by_name and ctx.needs_input_grad[i] else None
            for i, name in enumerate(ARGUMENTS)
        )

    torch.library.register_autograd(forward_name, backward, setup_context=_setup_context)
