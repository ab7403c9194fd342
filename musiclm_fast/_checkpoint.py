"""Files of plain values and tensors: written atomically, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from musiclm_fast._checks import describe
from musiclm_fast._files import atomic_file


class CheckpointError(ValueError):
    """A checkpoint that exists but cannot be used; the message has the reason."""


def save_atomically(path: str | os.PathLike[str], content: Any) -> None:
    """``torch.save`` next to ``path``, flush to disk, then move there.

    A crash or a full disk leaves an existing ``path`` untouched.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    with atomic_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's zip writer hides the operating system's error
            raise OSError(f"{path}: could not be written, is the disk full? {error}") from error


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a dictionary of plain values and tensors onto the CPU, executing nothing.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, truncated, or contains more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {str(path)!r}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # pickle, zip and torch raise different errors for a damaged file
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"checkpoint: {str(path)!r} is damaged or not a checkpoint of plain tensors ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint: {str(path)!r} holds {describe(content)}, not a dict")
    return content
