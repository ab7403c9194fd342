"""Checkpoints that contain their architecture: written atomically, read without executing code.

A checkpoint is a ``torch.save`` of plain values and tensors::

    {"format": 1, "config": {"audio": {...}, "text": {...}, "mulan": {...}},
     "model": state_dict, ...}

where ``config`` holds the constructor arguments of the two towers and of MuLaN
(:mod:`musiclm_fast.models.configuration`). It is read with ``weights_only=True``, so nothing in a
file is executed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from musiclm_fast._checkpoint import CheckpointError, read_checkpoint, save_atomically
from musiclm_fast.models.configuration import mulan_config
from musiclm_fast.models.mulan import MuLaN

FORMAT = 1


def save_checkpoint(path: str | os.PathLike[str], model: MuLaN, **extra: Any) -> None:
    """Write a model with its architecture, atomically.

    Args:
        path: the file; its folder is created if missing.
        model: a MuLaN whose towers a configuration can rebuild.
        extra: further entries (plain values and tensors), such as ``clip_seconds``.

    Raises:
        OSError: it could not be written; an earlier file at ``path`` is unchanged.
        TypeError: the model is not one that a configuration can rebuild.
    """
    content = {"format": FORMAT, "config": mulan_config(model), "model": model.state_dict()}
    save_atomically(path, {**extra, **content})


def load_mulan(path: str | os.PathLike[str]) -> tuple[MuLaN, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on the CPU.

    Args:
        path: a file of :func:`save_checkpoint`, or a folder of ``MuLaN.save_pretrained`` or of
            MuLaNTrainer, such as ``results/latest``.

    Returns:
        The model and the checkpoint's further entries.

    Raises:
        FileNotFoundError: there is no such file or folder.
        CheckpointError: it is damaged, of another kind, or its weights do not match its
            configuration.
    """
    if Path(path).is_dir():
        return MuLaN.from_pretrained_with_extra(path)
    content = read_checkpoint(path)
    config, weights = content.pop("config", None), content.pop("model", None)
    if not isinstance(config, dict) or not isinstance(weights, dict):
        raise CheckpointError(
            f"checkpoint: {str(path)!r} has no 'config' and 'model', expected a file written by "
            "musiclm_fast.models.checkpoint.save_checkpoint"
        )
    if content.pop("format", None) != FORMAT:
        raise CheckpointError(f"checkpoint: {str(path)!r} is not of format {FORMAT}")
    model = MuLaN.from_config(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint: {str(path)!r} holds weights of another architecture: {error}"
        ) from error
    return model.eval(), content
