"""Sound files, read as mono at one rate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checks import check_positive_int
from musiclm_fast._optional import require
from musiclm_fast._wording import plural


@dataclass(frozen=True)
class Sound:
    """A sound file in memory.

    Args:
        wav: ``(samples,)`` float32, mono.
        sample_rate: of wav, in Hz.
        file_channels, file_rate: of the file.
    """

    wav: Tensor
    sample_rate: int
    file_channels: int
    file_rate: int

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.wav) / self.sample_rate

    def describe(self) -> str:
        """The conversion of the file, in words."""
        parts = [f"{self.seconds:.2f} s"]
        if self.file_channels > 1:
            parts.append(f"{plural(self.file_channels, 'channel')} averaged to mono")
        if self.file_rate != self.sample_rate:
            parts.append(f"resampled from {self.file_rate} to {self.sample_rate} Hz")
        return ", ".join(parts)


def read_sound(path: str | os.PathLike[str], sample_rate: int) -> Sound:
    """Read a wav, flac, ogg or mp3 file (any format of libsndfile) as mono at ``sample_rate``.

    Channels are averaged; the rate is changed by soxr at its highest quality.

    Args:
        path: the file.
        sample_rate: wanted, in Hz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a sound file, is empty, or contains NaN or infinity.
        ImportError: soundfile or soxr is not installed.
    """
    check_positive_int("sample_rate", sample_rate)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sound: no file {str(path)!r}")
    soundfile, soxr = require("soundfile"), require("soxr")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (samples, channels)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"sound: {str(path)!r} cannot be read as sound: {error}") from error
    if not len(samples):
        raise ValueError(f"sound: {str(path)!r} holds no samples")
    if not np.isfinite(samples).all():
        raise ValueError(f"sound: {str(path)!r} holds NaN or infinity")
    mono = samples.mean(axis=1)
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="VHQ")
    return Sound(torch.from_numpy(np.ascontiguousarray(mono)), sample_rate, samples.shape[1], rate)
