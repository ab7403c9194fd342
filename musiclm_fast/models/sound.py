"""Sound as the models take it: files read as mono, rates changed, lists of clips made a batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_dtype,
    check_floating,
    check_ndim,
    check_positive_int,
    check_shape,
    describe,
    fail,
)
from musiclm_fast._optional import require


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


def resample(wav: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """Change the sample rate, with soxr at its highest quality, on the CPU.

    Args:
        wav: ``(samples,)`` or ``(B, samples)`` floating; on another device it goes there and back.
        from_hz, to_hz: rates in Hz.

    Returns:
        The same sound at ``to_hz``, on wav's device and in its dtype.

    Raises:
        ValueError: wav requires a gradient, which does not pass through.
        ImportError: soxr is not installed.
    """
    check_ndim("wav", wav, (1, 2), "(samples,) or (B, samples)")
    check_floating("wav", wav)
    check_positive_int("from_hz", from_hz)
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


def as_batch(
    wavs: Tensor | Sequence[Tensor],
    lengths: Tensor | None = None,
    *,
    from_hz: int | None = None,
    to_hz: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One padded batch of clips, and their lengths where these differ.

    Args:
        wavs: ``(B, samples)``, or B tensors ``(samples,)``.
        lengths: ``(B,)`` integer samples of each clip of a padded batch.
        from_hz: rate of wavs, if it is to be changed.
        to_hz: rate wanted; None where the model does not know its rate.

    Returns:
        ``(B, samples)`` and ``(B,)`` int64, or None where all clips are as long as the batch.

    Raises:
        ValueError, TypeError: clips of other shapes, lengths beside a list, a rate that cannot be
            changed.
    """
    if from_hz is not None:
        check_positive_int("input_sample_hz", from_hz)
        if to_hz is None:
            fail("input_sample_hz", from_hz, "None: this front end has no sample_hz of its own")
    if not isinstance(wavs, Tensor):
        if lengths is not None:
            fail("lengths", describe(lengths), "None beside a list of clips")
        if not isinstance(wavs, (list, tuple)) or not wavs:
            fail("wavs", repr(wavs), "a tensor (B, samples) or a list of at least one clip")
        for clip, wav in enumerate(wavs):
            check_ndim(f"wavs[{clip}]", wav, 1, "(samples,): mono; mix stereo down first")
            check_floating(f"wavs[{clip}]", wav)
        return _padded([_changed(wav, from_hz, to_hz) for wav in wavs])
    if lengths is None:
        return _changed(wavs, from_hz, to_hz), None
    check_shape("lengths", lengths, (wavs.shape[0],), "(B,)")
    check_dtype("lengths", lengths, (torch.int64, torch.int32))
    lengths = lengths.long()
    if from_hz is None or from_hz == to_hz:
        return wavs, lengths
    for clip, length in enumerate(lengths.tolist()):
        if not 0 < length <= wavs.shape[1]:
            allowed = f"1 to {wavs.shape[1]} samples"
            fail("lengths", f"{length} of clip {clip}", allowed)
    clips = [wav[:length] for wav, length in zip(wavs, lengths.tolist(), strict=True)]
    return _padded([_changed(wav, from_hz, to_hz) for wav in clips])


def _changed(wav: Tensor, from_hz: int | None, to_hz: int | None) -> Tensor:
    return wav if from_hz is None or to_hz is None else resample(wav, from_hz, to_hz)


def _padded(clips: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    lengths = [len(clip) for clip in clips]
    if len(set(lengths)) == 1:
        return torch.stack(clips), None
    # lengths stay on the CPU: buckets are made of them without waiting for a device
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor(lengths)


def similar_lengths(lengths: Sequence[int], spread: float) -> list[list[int]]:
    """Split clips into groups whose shortest is at least ``spread`` times their longest.

    Args:
        lengths: of the clips, in any unit.
        spread: between 0 (one group) and 1 (a group per length).

    Returns:
        The clips' indices, longest group first.
    """
    order = sorted(range(len(lengths)), key=lambda clip: -lengths[clip])
    groups: list[list[int]] = []
    longest = 0
    for clip in order:
        if not groups or lengths[clip] < spread * longest:
            groups.append([])
            longest = lengths[clip]
        groups[-1].append(clip)
    return groups
