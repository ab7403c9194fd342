"""Fake implementations and autograd of the contrastive kernels, and the losses built from them.

A backend is three ``torch.library`` ops, defined by the ``block_`` functions of reference.py. The
C++ library defines ``contrastive_logsumexp``, ``contrastive_logsumexp_backward`` and
``contrastive_sigmoid`` (csrc/library.cpp repeats the schemas); Triton defines the same names with
the suffix ``_triton`` in Python. :func:`register` gives either set its fakes and its gradients.

Without labels statistics leave the positives out. The softmax loss of a row is then
``ln(e^lse + e^s_ii) - s_ii = softplus(lse - s_ii)``. It and its gradient keep their precision even
where the positive dominates and ``lse_with_positive - s_ii`` would cancel. With several positives
the loss of a row ends at ``ln |P|``, not at zero: the softmax loss's statistics include them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast.ops.contrastive._labels import Labels, positives

LOGSUMEXP_SCHEMA = (
    "(Tensor audio, Tensor text, Tensor temperature, int offset, Tensor? audio_labels=None, "
    "Tensor? text_labels=None, bool inclusive=False) -> (Tensor, Tensor, Tensor)"
)
LOGSUMEXP_BACKWARD_SCHEMA = (
    "(Tensor grad_row, Tensor grad_column, Tensor grad_positive, Tensor audio, Tensor text, "
    "Tensor temperature, Tensor row_lse, Tensor column_lse, int offset, "
    "Tensor? audio_labels=None, Tensor? text_labels=None, bool inclusive=False) "
    "-> (Tensor, Tensor, Tensor)"
)
SIGMOID_SCHEMA = (
    "(Tensor audio, Tensor text, Tensor temperature, Tensor? bias, int offset, bool gradients, "
    "Tensor? audio_labels=None, Tensor? text_labels=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True)
class Kernels:
    """The three kernels of a backend: each takes what its ``block_`` function takes."""

    logsumexp: Any
    logsumexp_backward: Any
    sigmoid: Any


def loss(
    kernels: Kernels,
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    kind: str,
    labels: Labels | None,
) -> Tensor:
    """The loss of a square batch on one device; arguments as in ``contrastive_loss``, L first."""
    batch = audio.shape[1]
    given: tuple[Any, ...] = ()
    weight = None
    if labels is not None:
        found = positives(labels, kind, torch.float32)
        given, weight = found.block(), found.weight
    temperature = temperature.float()
    bias = None if bias is None else bias.float()
    if kind == "sigmoid":
        needed = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (audio, text, temperature, bias)
        )
        total: Tensor = kernels.sigmoid(audio, text, temperature, bias, 0, needed, *given[:2])[0]
        return total / batch
    row_lse, column_lse, positive = kernels.logsumexp(audio, text, temperature, 0, *given)
    result = per_pair(row_lse, column_lse, positive, kind, weight).mean(dim=1).sum()
    if bias is not None:  # it cancels: its gradient is zero
        result = result + 0.0 * bias.sum()
    return result


def per_pair(
    row_lse: Tensor, column_lse: Tensor, positive: Tensor, kind: str, weight: Tensor | None
) -> Tensor:
    """Loss of each pair ``(L, B)`` from its row's and column's statistics; with labels ``weight``
    ``(B,)`` is that of a row's positives."""
    if weight is not None:
        return 0.5 * (row_lse + column_lse) - weight * positive
    if kind == "decoupled":
        return 0.5 * (row_lse + column_lse) - positive
    return 0.5 * (F.softplus(row_lse - positive) + F.softplus(column_lse - positive))


def per_pair_gradients(
    row_lse: Tensor, column_lse: Tensor, positive: Tensor, kind: str, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of :func:`per_pair` by its three tensors."""
    if weight is not None or kind == "decoupled":
        half = torch.full_like(positive, 0.5)
        by_positive = torch.full_like(positive, -1.0)
        return half, half, by_positive if weight is None else weight * by_positive
    by_row = 0.5 * (row_lse - positive).sigmoid()
    by_column = 0.5 * (column_lse - positive).sigmoid()
    return by_row, by_column, -(by_row + by_column)


def _statistic(audio: Tensor, *shape: int) -> Tensor:
    return audio.new_empty(shape, dtype=torch.float32)


def _fake_logsumexp(
    audio: Tensor, text: Tensor, temperature: Tensor, offset: int,
    audio_labels: Tensor | None = None, text_labels: Tensor | None = None, inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layers, rows, _ = audio.shape
    columns = text.shape[1]
    return (
        _statistic(audio, layers, rows),
        _statistic(audio, layers, columns),
        _statistic(audio, layers, rows),
    )


def _fake_logsumexp_backward(
    grad_row: Tensor, grad_column: Tensor, grad_positive: Tensor, audio: Tensor, text: Tensor,
    temperature: Tensor, row_lse: Tensor, column_lse: Tensor, offset: int,
    audio_labels: Tensor | None = None, text_labels: Tensor | None = None, inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        _statistic(audio, *audio.shape),
        _statistic(audio, *text.shape),
        _statistic(audio, audio.shape[0]),
    )


def _fake_sigmoid(
    audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, offset: int,
    gradients: bool, audio_labels: Tensor | None = None, text_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layers = audio.shape[:1]
    d_audio, d_text, d_temperature, d_bias = (
        _statistic(audio, *(shape if gradients else (0,)))
        for shape in (audio.shape, text.shape, layers, layers)
    )
    return _statistic(audio), d_audio, d_text, d_temperature, d_bias


def _save_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    audio, text, temperature, ctx.offset, audio_labels, text_labels, ctx.inclusive = inputs
    row_lse, column_lse, _ = output
    ctx.save_for_backward(audio, text, temperature, row_lse, column_lse, audio_labels, text_labels)


def _save_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [inputs[0].dtype, inputs[1].dtype]
    ctx.has_bias = inputs[3] is not None
    ctx.has_gradients = inputs[5]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _sigmoid_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    if not ctx.has_gradients:
        raise RuntimeError("contrastive_sigmoid: it was called with gradients=False")
    d_audio, d_text, d_temperature, d_bias = ctx.saved_tensors
    results = (
        (d_audio * grad).to(ctx.dtypes[0]),
        (d_text * grad).to(ctx.dtypes[1]),
        d_temperature * grad,
        d_bias * grad if ctx.has_bias else None,
    )
    needed = (r if n else None for r, n in zip(results, ctx.needs_input_grad, strict=False))
    return (*needed, None, None, None, None)


def register(logsumexp: str, logsumexp_backward: str, sigmoid: str) -> Kernels:
    """Register fakes and autograd for three ops that exist, such as ``"musiclm_fast::x"``."""
    torch.library.register_fake(logsumexp)(_fake_logsumexp)
    torch.library.register_fake(logsumexp_backward)(_fake_logsumexp_backward)
    torch.library.register_fake(sigmoid)(_fake_sigmoid)

    def find(name: str) -> Any:
        namespace, op = name.split("::")
        return getattr(getattr(torch.ops, namespace), op)

    kernels = Kernels(find(logsumexp), find(logsumexp_backward), find(sigmoid))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        audio, text, temperature, row_lse, column_lse, *labels = ctx.saved_tensors
        results = kernels.logsumexp_backward(
            *(g.contiguous() for g in grads),
            audio, text, temperature, row_lse, column_lse, ctx.offset, *labels, ctx.inclusive,
        )  # fmt: skip
        inputs = (audio, text, temperature)
        return *(
            r.to(x.dtype) if needed else None
            for r, x, needed in zip(results, inputs, ctx.needs_input_grad, strict=False)
        ), None, None, None, None  # fmt: skip

    torch.library.register_autograd(logsumexp, backward, setup_context=_save_logsumexp)
    torch.library.register_autograd(sigmoid, _sigmoid_backward, setup_context=_save_sigmoid)
    return kernels
