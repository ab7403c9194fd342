"""Fake implementations and autograd of the compiled ops of csrc/spectrogram, for all devices.

The library registers ``musiclm_fast::spectrogram_forward`` and ``spectrogram_backward`` for CPU
tensors and, where it was built with CUDA, for CUDA tensors; both take :data:`ARGUMENTS` in order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast.ops.spectrogram.reference import num_frames

PAD_MODES = ("reflect", "constant", "replicate", "circular")  # in the order of csrc's PadMode
_TENSORS = ("wav", "window", "mel", "freq_mask", "time_mask", "lengths", "rates")
ARGUMENTS = (
    *_TENSORS, "n_fft", "hop_length", "pad", "center", "pad_mode", "magnitude", "log_offset",
    "mean", "std", "mask_value", "crop_bands", "crop_frames",
)  # fmt: skip


def run(**arguments: Any) -> Tensor:
    """Call the compiled op with the dispatcher's keyword arguments."""
    a = arguments
    rate = a.pop("stretch_rate")
    if rate is not None and not isinstance(rate, Tensor):
        rate = torch.full((1,), rate, dtype=torch.float64, device=a["wav"].device)
    a["rates"] = None if rate is None else rate.detach().double()
    a["wav"] = a["wav"].float()
    a["window"] = a["window"].float().contiguous()
    a["mel"] = None if a["mel"] is None else a["mel"].float()
    for name in ("freq_mask", "time_mask", "lengths", "rates"):
        a[name] = None if a[name] is None else a[name].contiguous()
    a["pad_mode"] = PAD_MODES.index(a["pad_mode"])
    a["magnitude"] = a.pop("power") == 1.0
    a["crop_bands"], a["crop_frames"] = a.pop("crop")
    out: Tensor = torch.ops.musiclm_fast.spectrogram_forward.default(*(a[n] for n in ARGUMENTS))
    return out


def register() -> None:
    """Register fakes and autograd for the library's ops; once, after it is loaded."""
    torch.library.register_fake("musiclm_fast::spectrogram_forward")(_fake_forward)
    torch.library.register_fake("musiclm_fast::spectrogram_backward")(_fake_backward)
    torch.library.register_autograd(
        "musiclm_fast::spectrogram_forward", _backward, setup_context=_setup_context
    )


def _fake_forward(*inputs: Any) -> Tensor:
    a = dict(zip(ARGUMENTS, inputs, strict=True))
    batch, samples = a["wav"].shape
    bands = a["n_fft"] // 2 + 1 if a["mel"] is None else a["mel"].shape[1]
    frames = num_frames(samples, a["n_fft"], a["hop_length"], a["pad"], a["center"])
    crop_bands, crop_frames = a["crop_bands"], a["crop_frames"]
    shape = (batch, bands // crop_bands * crop_bands, frames // crop_frames * crop_frames)
    out: Tensor = a["wav"].new_empty(shape)
    return out


def _fake_backward(grad: Tensor, wav: Tensor, *_: Any) -> Tensor:
    return wav.new_empty(wav.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(_TENSORS)])
    ctx.options = inputs[len(_TENSORS) :]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_wav = None
    if ctx.needs_input_grad[0]:
        grad_wav = torch.ops.musiclm_fast.spectrogram_backward.default(
            grad.contiguous(), *ctx.saved_tensors, *ctx.options
        )
    return grad_wav, *(None,) * (len(ARGUMENTS) - 1)
