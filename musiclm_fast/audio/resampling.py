"""Changes of the sample rate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checks import check_floating, check_ndim, check_positive_int, fail
from musiclm_fast._optional import require


def resample(wav: Tensor, from_hz: int | None, to_hz: int | None) -> Tensor:
    """Change the sample rate, with soxr at its highest quality, on the CPU.

    Args:
        wav: ``(samples,)`` or ``(B, samples)`` floating; copied to the CPU and back if need be.
        from_hz: its rate in Hz; None if it already has the target rate.
        to_hz: target rate in Hz; None for a model without a defined rate.

    Returns:
        The same sound at ``to_hz``, on wav's device and in its dtype.

    Raises:
        ValueError: from_hz is given and to_hz is not known, or wav requires a gradient, which
            resampling does not support.
        ImportError: soxr is not installed.
    """
    if from_hz is None:
        return wav
    check_positive_int("from_hz", from_hz)
    if to_hz is None:
        fail("to_hz", None, "a rate in Hz: the model does not know its sample rate")
    check_ndim("wav", wav, (1, 2), "(samples,) or (B, samples)")
    check_floating("wav", wav)
    check_positive_int("to_hz", to_hz)
    if wav.requires_grad:
        fail("wav", "a tensor that requires a gradient", "none: resample beforehand")
    if from_hz == to_hz or wav.numel() == 0:
        return wav
    soxr = require("soxr")
    dtype = torch.float64 if wav.dtype == torch.float64 else torch.float32
    columns = wav.to("cpu", dtype).t().numpy()  # (samples, B): soxr's channels
    changed = soxr.resample(np.ascontiguousarray(columns), from_hz, to_hz, quality="VHQ")
    return torch.from_numpy(np.ascontiguousarray(changed.T)).to(wav.device, wav.dtype)
