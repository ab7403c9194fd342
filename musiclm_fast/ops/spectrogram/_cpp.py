"""The C++ kernel of csrc/spectrogram for CPU tensors; it computes in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.spectrogram import _autograd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_FOLDED_TAPS, MAX_FOLDED_FFT = 63, 1 << 13  # of csrc/spectrogram/spectrogram.h
MAX_RADIX, MAX_FFT = 31, 1 << 20


def largest_prime_factor(n: int) -> int:
    """Largest prime factor of n; 1 for 1."""
    largest, factor = 1, 2
    while factor * factor <= n:
        while n % factor == 0:
            largest, n = factor, n // factor
        factor += 1
    return max(largest, n)


def can_compute(
    n_fft: int, window: Tensor, power: float, mel: Tensor | None, **_: Any
) -> tuple[bool, str]:
    """Whether the kernels, on any device, can take these arguments, and why not."""
    if power not in (1.0, 2.0):
        return False, f"it raises magnitudes to power 1 or 2, not {power}"
    if window.requires_grad or (mel is not None and mel.requires_grad):
        return False, "it has gradients for wav only, not for window or mel"
    if window.shape[0] <= MAX_FOLDED_TAPS and n_fft <= MAX_FOLDED_FFT:
        return True, ""
    if n_fft > MAX_FFT or largest_prime_factor(n_fft) > MAX_RADIX:
        return False, f"n_fft = {n_fft} is above 2**20 or has a prime factor above {MAX_RADIX}"
    return True, ""


def supports(wav: Tensor, **arguments: Any) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    ok, reason = _compiled.supports(wav, "cpu", DTYPES)
    return can_compute(**arguments) if ok else (False, reason)


run = _autograd.run

if _extension.load():
    _autograd.register()
