"""The CUDA C++ kernel of csrc/spectrogram; it computes in float32.

No length, mask or rate is read on the host, so a call never waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast._oracle import first_difference, to_float64
from musiclm_fast._self_check import in_default_modes
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.spectrogram import _autograd, _cpp
from musiclm_fast.ops.spectrogram.reference import mel_filters, spectrogram_reference

MAX_FFT = 4096  # the spectra of a group of frames must fit into shared memory
MAX_FOLDED_FFT = 1024  # likewise, with one thread per frame


def available() -> tuple[bool, str]:
    """Whether the compiled library is loaded and has CUDA kernels, and why not."""
    status = _extension.extension_status()
    if status.loaded and not status.facts["cuda_archs"]:
        why = "the compiled library was built without CUDA kernels"
        how = f"to build it with nvcc and MUSICLM_FAST_CUDA=1: {_extension.HOW_TO_BUILD}"
        return False, f"{why}; {how}"
    return status.loaded, status.reason


def check_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes of wav to check on a device."""
    return _cpp.DTYPES if device.type == "cuda" else ()


def supports(wav: Tensor, n_fft: int, window: Tensor, **arguments: Any) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    ok, reason = _compiled.supports(wav, "cuda", _cpp.DTYPES)
    if not ok:
        return False, reason
    if n_fft > MAX_FFT:
        return False, f"n_fft = {n_fft} is above {MAX_FFT}"
    if window.shape[0] <= _cpp.MAX_FOLDED_TAPS and n_fft > MAX_FOLDED_FFT:
        return False, f"n_fft = {n_fft} is above {MAX_FOLDED_FFT} for a window below 64 samples"
    return _cpp.can_compute(n_fft=n_fft, window=window, **arguments)


@in_default_modes
def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare values and gradients with the reference; None, or what differs.

    The cases cover both transforms, the stretch, mel bands, the logarithm, masks and lengths.
    Gradients of magnitudes are compared on clicks, one per frame: a click's spectrum has no zeros,
    and at a zero magnitude the gradient's direction is arbitrary.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3000, 1777])
    freq_mask = torch.tensor([[[3, 9]], [[11, 12]]])
    time_mask = torch.tensor([[[0, 5]], [[7, 9]]])
    common = dict(pad_mode="reflect", freq_mask=freq_mask, time_mask=time_mask, lengths=lengths)
    clicks = torch.zeros(2, 3000)
    clicks[:, 40:2960:76] = 1.0 + torch.rand(2, 39, generator=generator)
    cases = {
        "24 of 128": dict(n_fft=128, hop_length=12, window=torch.hann_window(24), crop=(16, 16)),
        "400 of 512, log-mel": dict(
            n_fft=512, hop_length=160, window=torch.hann_window(400), log_offset=0.1, std=5.0,
            mel=mel_filters(16_000, 512, 64),
        ),
        "63 of 75, stretched": dict(
            n_fft=75, hop_length=20, window=torch.hann_window(63), stretch_rate=0.8, power=1.0,
            wav=clicks,
        ),
        "75 of 75, stretched": dict(
            n_fft=75, hop_length=20, window=torch.hann_window(75), stretch_rate=1.3, wav=clicks
        ),
        "240 of 240, uncentred": dict(
            n_fft=240, hop_length=77, window=torch.hann_window(240), center=False, pad=5
        ),
    }  # fmt: skip
    wav = torch.randn(2, 3000, generator=generator)

    def result(run: Any, arguments: dict[str, Any], to: torch.device) -> dict[str, Tensor]:
        moved = {k: v.to(to) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        out = run(**moved)
        weight = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        (grad,) = torch.autograd.grad(out, moved["wav"], weight.to(out))
        return {"values": out.detach().cpu(), "gradient": grad.cpu()}

    defaults = dict(
        pad=0, center=True, power=2.0, stretch_rate=None, mel=None, log_offset=None, mean=0.0,
        std=1.0, mask_value=0.0, crop=(1, 1),
    )  # fmt: skip
    for name, case in cases.items():
        # wav first, and some cases bring their own
        arguments: dict[str, Any] = {"wav": wav, **defaults, **common, **case}
        arguments["wav"] = arguments["wav"].to(dtype, copy=True).requires_grad_()
        results = (
            result(_autograd.run, arguments, device),
            result(spectrogram_reference, arguments, torch.device("cpu")),
            result(spectrogram_reference, to_float64(arguments), torch.device("cpu")),
        )
        problem = first_difference(name, results)
        if problem is not None:
            return problem
    return None


run = _autograd.run
