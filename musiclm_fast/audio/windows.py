"""Sounds cut into windows of a model's clip length."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import check_ndim, check_positive_int, fail


def cut_windows(wav: Tensor, samples: int, silence: float = 1e-3) -> Tensor:
    """Cut a sound into windows that overlap by half; a shorter sound is padded with zeros.

    Windows whose peak lies below ``silence`` times the sound's peak (-60 dB) are skipped as
    silent.

    Args:
        wav: ``(n,)`` floating.
        samples: length of a window.
        silence: relative peak below which a window counts as silent.

    Returns:
        ``(windows, samples)``, at least one; the last one ends at the end of the sound.

    Raises:
        ValueError: the sound is empty or all zeros.
    """
    check_ndim("wav", wav, 1, "(samples,)")
    check_positive_int("samples", samples)
    peak = wav.abs().amax().item() if len(wav) else 0.0
    if peak == 0.0:
        fail("wav", "nothing but silence", "a sound")
    if len(wav) <= samples:
        return torch.nn.functional.pad(wav, (0, samples - len(wav)))[None]
    last = len(wav) - samples
    starts = torch.tensor([*range(0, last, max(1, samples // 2)), last])
    windows = wav[starts[:, None] + torch.arange(samples)]  # (windows, samples)
    return windows[windows.abs().amax(dim=1) >= silence * peak]
