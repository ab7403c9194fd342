"""Contrastive losses between two sets of latents: contract, checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from musiclm_fast._checks import (
    check_choice,
    check_floating,
    check_ndim,
    check_same_device,
    check_shape,
    fail,
)
from musiclm_fast._dispatch import Backend, Dispatcher
from musiclm_fast.ops.contrastive.reference import contrastive_loss_reference

KINDS = ("softmax", "decoupled", "sigmoid")


def contrastive_loss(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of B pairs of latents, summed over L layers.

    With ``s[l, i, j] = temperature[l] * <audio[l, i], text[l, j]> + bias[l]``::

        softmax    sum_l mean_i( -s_ii + (ln sum_j e^s_ij + ln sum_j e^s_ji) / 2 )
        decoupled  the same with j = i left out of both sums
        sigmoid    -sum_l sum_ij ln sigmoid(y_ij s_ij) / B,  y_ij = 1 if i = j else -1

    Args:
        audio: ``(L, B, d)`` or ``(B, d)`` floating; usually l2-normed.
        text: same shape.
        temperature: ``(L,)`` factors of the similarities, above zero.
        bias: ``(L,)`` added to the similarities (sigmoid), or None.
        kind: ``"softmax"``, ``"decoupled"`` or ``"sigmoid"``.
        backend: ``"cpp"``, ``"triton"`` or ``"torch"``; None takes the first that supports the
            call.

    Returns:
        The loss, a scalar in float32 (float64 for float64 latents). Gradients reach both latents,
        temperature and bias.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above; a
            decoupled batch of one, whose sums are empty.
        BackendError: the named backend cannot run this call.

    Sources: https://arxiv.org/abs/2103.00020 (softmax), https://arxiv.org/abs/2110.06848
    (decoupled), https://arxiv.org/abs/2303.15343 (sigmoid).
    """
    check_ndim("audio", audio, (2, 3), "(L, B, d) or (B, d)")
    check_floating("audio", audio)
    check_shape("text", text, tuple(audio.shape), "of audio")
    check_floating("text", text)
    if audio.ndim == 2:
        audio, text = audio.unsqueeze(0), text.unsqueeze(0)
    layers, batch, _ = audio.shape
    check_shape("temperature", temperature, (layers,), "(L,)")
    if bias is not None:
        check_shape("bias", bias, (layers,), "(L,)")
    check_choice("kind", kind, KINDS)
    if batch == 0:
        fail("audio", "an empty batch", "at least one pair")
    if kind == "decoupled" and batch == 1:
        fail("audio", "a batch of one pair", "at least two: the decoupled loss has no negatives")
    check_same_device("audio", audio, text=text, temperature=temperature, bias=bias)
    arguments = dict(audio=audio, text=text, temperature=temperature, bias=bias, kind=kind)
    return dispatcher.select(backend, audio.device, **arguments).run(**arguments)


dispatcher = Dispatcher(
    "contrastive",
    [Backend("torch", lambda **_: (True, ""), contrastive_loss_reference)],
)
