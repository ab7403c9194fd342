"""Rates that may not be known."""

from __future__ import annotations

from torch import Tensor

from musiclm_fast._checks import fail
from musiclm_fast.models import sound


def resample(wave: Tensor, from_hz: int | None, to_hz: int | None) -> Tensor:
    """Waves at the rate that a model hears.

    Args:
        wave: ``(samples,)`` or ``(B, samples)`` floating.
        from_hz: its rate in Hz; None says that it already has the wanted one.
        to_hz: the wanted rate in Hz.

    Raises:
        ValueError: from_hz is given and the wanted rate is not known.
    """
    if from_hz is None:
        return wave
    if to_hz is None:
        fail("to_hz", None, "a rate in Hz: the model does not say at which rate it hears")
    return sound.resample(wave, from_hz, to_hz)
