"""Sound files, written atomically."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from musiclm_fast._checks import fail
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        soundfile.write(str(temporary), flat.numpy(), sample_hz, format=path.suffix[1:] or "wav")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
