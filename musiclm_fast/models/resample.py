"""Sample rates: from any to any, by soxr."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import check_positive_int, fail


def resample(wave: Tensor, from_hz: int | None, to_hz: int | None) -> Tensor:
    """Waves at another rate.

    Args:
        wave: ``(..., samples)`` floating.
        from_hz: its rate in Hz; None says that it already has the wanted one.
        to_hz: the wanted rate in Hz.

    Returns:
        ``(..., samples * to_hz / from_hz)``, in wave's dtype and on its device; wave itself where
        nothing is to be done. No gradient passes.

    Raises:
        ValueError: from_hz is given and the wanted rate is not known.
        ImportError: rates differ and soxr is not installed.
    """
    if from_hz is None:
        return wave
    check_positive_int("from_hz", from_hz)
    if to_hz is None:
        fail("to_hz", None, "a rate in Hz: the model does not say at which rate it hears")
    if from_hz == to_hz:
        return wave
    try:
        import soxr
    except ImportError as error:
        raise ImportError("resampling needs soxr: pip install soxr") from error
    flat = wave.detach().reshape(-1, wave.shape[-1]).t().float().cpu().contiguous()
    resampled = torch.from_numpy(soxr.resample(flat.numpy(), from_hz, to_hz)).t()
    return resampled.reshape(*wave.shape[:-1], -1).to(device=wave.device, dtype=wave.dtype)
