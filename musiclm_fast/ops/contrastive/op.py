"""Contrastive losses between two sets of latents: contract, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import (
    NonFiniteError,
    check_choice,
    check_floating,
    check_ndim,
    check_same_device,
    check_shape,
    fail,
)
from musiclm_fast._dispatch import Dispatcher, torch_backend
from musiclm_fast._wording import plural
from musiclm_fast.ops import _compiled, _triton_target
from musiclm_fast.ops.contrastive import _cpp, _triton
from musiclm_fast.ops.contrastive._autograd import Kernels
from musiclm_fast.ops.contrastive._labels import check_labels, check_positives
from musiclm_fast.ops.contrastive.reference import (
    block_logsumexp,
    block_logsumexp_backward,
    block_sigmoid,
    contrastive_loss_reference,
)

KINDS = ("softmax", "decoupled", "sigmoid")


def contrastive_loss(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    check_values: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of B pairs of latents, summed over L layers.

    With ``s[l, i, j] = temperature[l] * <audio[l, i], text[l, j]> + bias[l]``::

        softmax    sum_l mean_i( -s_ii + (ln sum_j e^s_ij + ln sum_j e^s_ji) / 2 )
        decoupled  the same with j = i left out of both sums
        sigmoid    -sum_l sum_ij ln sigmoid(y_ij s_ij) / B,  y_ij = 1 if i = j else -1

    With ``labels`` pair (i, j) is a positive where audio i and text j have equal labels: several
    captions of a clip in one batch are then no negatives of each other. P_i are row i's positives,
    and the mean of both directions is taken, rows and columns::

        softmax    sum_l mean_i( -mean_{j in P_i} s_ij + ln sum_j e^s_ij )
        decoupled  the same with all of P_i left out of the sum
        sigmoid    y_ij = 1 at every positive

    A label for each pair alone, such as ``arange(B)``, gives the loss without labels.

    Latents and temperatures of any size are safe: sums of exponentials are shifted unless a bound
    on the similarities makes that unnecessary, and nothing is clamped. Only ``"torch"`` holds B x B
    numbers. For a batch spread over ranks see
    :func:`musiclm_fast.ops.distributed_contrastive_loss`.

    Under ``torch.autocast("cuda")`` float32 latents are rounded to its dtype, for products on the
    tensor cores; sums, statistics and the loss stay float32. On CPU autocast changes nothing.

    Args:
        audio: ``(L, B, d)`` or ``(B, d)`` floating; usually l2-normed.
        text: same shape.
        temperature: ``(L,)`` factors of the similarities, above zero.
        bias: ``(L,)`` added to the similarities, or None; only the sigmoid loss depends on it.
        kind: ``"softmax"``, ``"decoupled"`` or ``"sigmoid"``.
        labels: ``(B,)`` integers, the clip of each pair, or a tuple ``(audio's, text's)``.
        check_values: whether to read the values and raise on non-finite latents, a temperature not
            above zero or labels without a positive (decoupled: without a negative). None checks on
            CPU, where it costs no synchronisation, and not while ``torch.compile`` traces. Unread,
            the positives of a row without any count 0; a decoupled row without negatives makes
            the loss -inf, with finite gradients.
        backend: ``"cpp"``, ``"triton"`` or ``"torch"``; None takes the first that supports the
            call.

    Returns:
        The loss, a scalar in float32 (float64 for float64 latents). Gradients reach both latents,
        temperature and bias.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above;
            non-finite latents, labels that fit no pair (see ``check_values``); a decoupled batch
            of one, whose sums are empty.
        BackendError: the named backend cannot run this call.

    Sources: https://arxiv.org/abs/2103.00020 (softmax), https://arxiv.org/abs/2110.06848
    (decoupled), https://arxiv.org/abs/2303.15343 (sigmoid), https://arxiv.org/abs/2004.11362
    (labels: L_out).
    """
    audio, text = check_latents(audio, text)
    batch = audio.shape[1]
    check_parameters(audio, temperature, bias, kind)
    if batch == 0:
        fail("audio", "an empty batch", "at least one pair")
    if kind == "decoupled" and batch == 1:
        fail("audio", "a batch of one pair", "at least two: the decoupled loss has no negatives")
    sides = check_labels(labels, audio.shape[1], audio)
    check_finite(audio, text, temperature, check_values)
    if sides is not None and reads_values(audio, check_values):
        check_positives(sides, kind)
    arguments = dict(
        audio=audio, text=text, temperature=temperature, bias=bias, kind=kind, labels=sides
    )
    return dispatcher.select(backend, audio.device, **arguments).run(**arguments)


def check_latents(audio: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Latents as ``(L, B, d)`` of one dtype, autocast's on CUDA; without L they get L = 1.

    Raises:
        ValueError, TypeError: they are not of one shape and device, and floating.
    """
    check_ndim("audio", audio, (2, 3), "(L, B, d) or (B, d)")
    check_floating("audio", audio)
    check_shape("text", text, tuple(audio.shape), "of audio")
    check_floating("text", text)
    check_same_device("audio", audio, text=text)
    if audio.dtype != text.dtype:
        wider = torch.promote_types(audio.dtype, text.dtype)
        audio, text = audio.to(wider), text.to(wider)
    if audio.is_cuda and audio.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        # Normalising a tower's output makes it float32, whose products take ten times as long.
        chosen = torch.get_autocast_dtype("cuda")
        audio, text = audio.to(chosen), text.to(chosen)
    return (audio, text) if audio.ndim == 3 else (audio.unsqueeze(0), text.unsqueeze(0))


def check_parameters(audio: Tensor, temperature: Tensor, bias: Tensor | None, kind: str) -> None:
    """Shapes, dtypes and devices of the parameters, and the name of the loss."""
    layers = audio.shape[0]
    check_shape("temperature", temperature, (layers,), "(L,)")
    check_floating("temperature", temperature)
    if bias is not None:
        check_shape("bias", bias, (layers,), "(L,)")
        check_floating("bias", bias)
    check_choice("kind", kind, KINDS)
    check_same_device("audio", audio, temperature=temperature, bias=bias)


def reads_values(audio: Tensor, check_values: bool | None) -> bool:
    """Whether a call reads its tensors' values: by default on CPU, where nothing waits for it."""
    if check_values is None:
        check_values = audio.device.type == "cpu"
    return check_values and not torch.compiler.is_compiling()


def check_finite(
    audio: Tensor, text: Tensor, temperature: Tensor, check_values: bool | None
) -> None:
    """Read the values, on CPU or where asked: finite latents, temperatures above zero.

    Raises:
        ValueError: naming the side and its first bad rows, or the temperature.
    """
    if not reads_values(audio, check_values):
        return
    for name, latents in (("audio", audio), ("text", text)):
        latents = latents.detach()
        if latents.sum().isfinite():  # one pass; a sum can overflow, so look again where not
            continue
        bad = ~latents.isfinite().all(dim=-1).all(dim=0)  # (B,)
        if bad.any():
            rows = bad.nonzero().flatten().tolist()
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            found = f"non-finite latents in {len(rows)} of {plural(len(bad), 'row')} ({shown})"
            fail(name, found, "finite", NonFiniteError)
    if not (temperature.detach() > 0).all():
        fail("temperature", temperature.tolist(), "factors above 0")


def block_kernels(backend: str) -> Kernels:
    """A backend's kernels for rectangular blocks; the distributed losses are built from them."""
    if backend == "cpp":
        return _cpp.kernels
    if backend == "triton":
        return _triton.kernels
    return Kernels(block_logsumexp, block_logsumexp_backward, block_sigmoid)


def prepare(backend: str, latents: Tensor) -> Tensor:
    """Latents with the dtype and strides that a backend's kernels read."""
    modules = {"cpp": _cpp, "triton": _triton}
    return modules[backend].prepare(latents) if backend in modules else latents


dispatcher = Dispatcher(
    "contrastive",
    [
        _compiled.cpp_backend(_cpp.supports, _cpp.run),
        _triton_target.triton_backend(_triton.supports, _triton.run, _triton.self_check),
        torch_backend(contrastive_loss_reference),
    ],
)
