"""Sound files: read, mixed to mono, resampled, cut into clips of a model's length."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checks import check_ndim, check_positive_int, fail


@dataclass(frozen=True)
class Sound:
    """A sound file in memory.

    Args:
        wav: ``(samples,)`` float32, mono.
        sample_rate: of wav, in Hz.
        file_channels, file_rate: what the file had.
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
        """What was done to the file, for people."""
        parts = [f"{self.seconds:.2f} s"]
        if self.file_channels > 1:
            parts.append(f"{self.file_channels} channels averaged to mono")
        if self.file_rate != self.sample_rate:
            parts.append(f"resampled from {self.file_rate} to {self.sample_rate} Hz")
        return ", ".join(parts)


def read_sound(path: str | os.PathLike[str], sample_rate: int) -> Sound:
    """Read a wav, flac, ogg or mp3 file (whatever libsndfile reads) as mono at ``sample_rate``.

    Channels are averaged; the rate is changed by soxr at its highest quality.

    Args:
        path: the file.
        sample_rate: wanted, in Hz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no sound file, holds no samples, or holds NaN or infinity.
        ImportError: soundfile or soxr is not installed.
    """
    check_positive_int("sample_rate", sample_rate)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"sound: no file {str(path)!r}")
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise ImportError(
            f"sound files need soundfile and soxr ({error}): pip install soundfile soxr"
        ) from error
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


def cut_windows(wav: Tensor, samples: int, silence: float = 1e-3) -> Tensor:
    """Cut a sound into windows that overlap by half; what is shorter is padded with zeros.

    Windows whose peak lies below ``silence`` times the sound's peak (-60 dB) are left out, since
    they say nothing about it.

    Args:
        wav: ``(n,)`` floating.
        samples: length of a window.
        silence: relative peak below which a window counts as silent.

    Returns:
        ``(windows, samples)``, at least one; the last one ends where the sound ends.

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
