"""Parts of sound files, decoded as mono at one rate."""

from __future__ import annotations

import io
import math
import os
from typing import Any

import numpy as np

from musiclm_fast._optional import require

_CONTEXT = 1024  # frames around a clip within the resampler's filter


# Headers of sound files overstate the length a little (an ogg of a Debian package: 0.13 s of 207).
_SLACK_SECONDS, _SLACK_SHARE = 0.5, 0.05


class UnreadableSoundError(ValueError):
    """A sound that cannot be read; the message is the reason."""


class _Member(io.RawIOBase):
    # A member of a tar as a file; each reader opens it separately.
    def __init__(self, path: str, offset: int, size: int) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - closed with this object
        self.offset, self.size, self.position = offset, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self.size - self.position))
        self.file.seek(self.offset + self.position)
        read = self.file.readinto(memoryview(buffer)[:wanted])
        self.position += read
        return read

    def close(self) -> None:
        self.file.close()
        super().close()


def _message(error: Exception) -> str:
    # An error's message without the file's name, so that equal reasons can be counted.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")


CUT_SHORT = "cut short: holds fewer frames than its header says"


def slack(frames: int, rate: int) -> int:
    """Frames that may be missing at the end of a file of ``frames`` by its header."""
    return int(min(_SLACK_SECONDS * rate, _SLACK_SHARE * frames))


def _read_mono(file: Any, first: int, frames: int, sample_hz: int) -> tuple[np.ndarray, int]:
    # Frames of an open file as mono at sample_hz, (samples,) float32, and how many are missing at
    # the file's end. The surroundings are read too, for the resampler's filter, as a multiple
    # of the least common period of both rates: sample 0 is then exactly at frame ``first``.
    soundfile = require("soundfile")

    rate = file.samplerate
    before = 0
    after = 0
    if rate != sample_hz:
        period = rate // math.gcd(rate, sample_hz)  # frames
        before = min(math.ceil(_CONTEXT / period), first // period) * period
        after = min(_CONTEXT, file.frames - first - frames)
    try:
        file.seek(first - before)
        sound = file.read(before + frames + after, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise UnreadableSoundError(f"damaged or cut short: {_message(error)}") from error
    missing = max(0, before + frames - len(sound))
    if not len(sound):
        return np.zeros(0, np.float32), missing
    # numpy's mean over an axis of 2 takes a third as long as decoding
    mono = sound[:, 0].copy()  # (frames,)
    for channel in range(1, sound.shape[1]):
        mono += sound[:, channel]
    mono /= sound.shape[1]
    if not np.isfinite(mono).all():
        raise UnreadableSoundError("holds NaN or infinity")
    if rate != sample_hz:
        soxr = require("soxr")

        mono = soxr.resample(mono, rate, sample_hz, quality="VHQ")
        skip = before * sample_hz // rate
        mono = mono[skip : skip + round(max(0, frames - missing) * sample_hz / rate)]
    return np.ascontiguousarray(mono), missing


def need_soundfile() -> None:
    """Raise ImportError with the command to install, if a package to read sounds is missing."""
    require("soundfile")
    require("soxr")
