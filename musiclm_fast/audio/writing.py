"""Sound files, written atomically."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from musiclm_fast._checks import fail
from musiclm_fast._files import atomic_file
from musiclm_fast._optional import require


def write_wave(path: str | Path, wave: Tensor | None, sample_hz: int) -> None:
    """Write ``(1, samples)`` as a sound file in the name's format, scaled down if it would clip.

    Raises:
        ValueError: there is nothing to write.
    """
    soundfile = require("soundfile")

    if wave is None or wave.numel() == 0:
        fail("wave", "an empty one: the model ended at once", "sound; try another seed")
    flat = wave.detach().reshape(-1).float().cpu()
    flat = torch.nan_to_num(flat) / max(1.0, float(flat.abs().max()))
    with atomic_file(path) as file:
        soundfile.write(file, flat.numpy(), sample_hz, format=Path(path).suffix[1:] or "wav")
