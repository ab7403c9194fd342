"""A folder of sound files as clips without captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from musiclm_fast._checks import fail
from musiclm_fast.audio.reading import read_sound
from musiclm_fast.audio.resampling import resample


class SoundFolder(Dataset[Any]):
    """The sound files below a folder, as clips at one rate or at several.

    Args:
        folder: searched with all its subfolders.
        sample_hz: a rate in Hz, or one per wave of a row.
        max_length: samples of a clip at the highest rate; longer files are cut at random, shorter
            ones padded with zeros. None keeps files whole.
        multiple_of: clips are cut to a multiple of this many samples; one, or one per rate.
        extensions: of the files.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no sound file in it.
    """

    def __init__(
        self,
        folder: str | Path,
        sample_hz: int | Sequence[int],
        max_length: int | None = None,
        multiple_of: int | Sequence[int | None] | None = None,
        extensions: Sequence[str] = ("flac", "wav", "mp3", "ogg"),
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"folder: no folder at {folder}")
        found = {path for e in extensions for path in folder.rglob(f"*.{e}") if path.is_file()}
        self.files = sorted(found)
        if not self.files:
            fail("folder", f"{folder} without any {', '.join(extensions)} file", "some sound")
        self.rates = (sample_hz,) if isinstance(sample_hz, int) else tuple(sample_hz)
        whole = [multiple_of] if not isinstance(multiple_of, Sequence) else list(multiple_of)
        self.multiple_of = whole * len(self.rates) if len(whole) == 1 else whole
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, ...]:
        highest = max(self.rates)
        wave = read_sound(self.files[index], highest).wav
        if self.max_length is not None:
            spare = wave.shape[0] - self.max_length
            if spare > 0:
                start = int(torch.randint(spare + 1, ()))
                wave = wave[start : start + self.max_length]
            else:
                wave = nn.functional.pad(wave, (0, -spare))
        waves = []
        for rate, multiple in zip(self.rates, self.multiple_of, strict=True):
            own = resample(wave, highest, rate)
            waves.append(own if multiple is None else own[: own.shape[0] // multiple * multiple])
        return waves[0] if len(waves) == 1 else tuple(waves)
