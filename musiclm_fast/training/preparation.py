"""What is done to accelerate and to a model's towers before training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from musiclm_fast._checks import fail
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.text_tower import TextTransformer
from musiclm_fast.nn.transformer import Transformer
from musiclm_fast.training.accelerated import DistributedDataParallelKwargs, get_available_trackers


def processes_on_cpu() -> bool:
    """Whether torchrun started several processes on a machine without an accelerator.

    accelerate must be told, or each of them trains alone.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def accelerator_arguments(
    mixed_precision: str | None,
    log_with: list[str] | None,
    folder: Path,
    own: dict[str, Any],
    uses_all_parameters: bool,
) -> dict[str, Any]:
    """Keyword arguments of an Accelerator.

    Args:
        mixed_precision, log_with: as the trainers take them.
        folder: of the run, for trackers that write files.
        own: the caller's ``accelerate_kwargs``, which go before ours.
        uses_all_parameters: whether every step has a gradient for every parameter.

    Raises:
        ValueError: one of the two stands in ``own`` too, and otherwise.
    """
    arguments = dict(own)
    for name, value in (("mixed_precision", mixed_precision), ("log_with", log_with)):
        if value is not None and _listed(own.get(name, value)) != _listed(value):
            fail(name, f"{value!r} beside {own[name]!r} in accelerate_kwargs", "one of them")
        if value is not None:
            arguments[name] = value
    if arguments.get("log_with") is not None:
        arguments.setdefault("project_dir", str(folder))
    handlers = list(arguments.get("kwargs_handlers") or [])
    if not any(isinstance(handler, DistributedDataParallelKwargs) for handler in handlers):
        find = not uses_all_parameters
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=find))
    arguments["kwargs_handlers"] = handlers
    if processes_on_cpu():
        arguments.setdefault("cpu", True)
    return arguments


def uses_all_parameters(mulan: MuLaN) -> bool:
    """Whether every step trains every parameter; a Hugging Face tower may have unused ones."""
    towers = (AudioSpectrogramTransformer, TextTransformer)
    return isinstance(mulan.audio, towers) and isinstance(mulan.text, towers)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_trackers(log_with: Sequence[Any]) -> None:
    """All trackers that were asked for are there: accelerate leaves out what is not installed.

    Raises:
        ValueError: one is not.
    """
    there = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for tracker in log_with:
        if isinstance(tracker, str) and tracker not in {*there, "all"}:
            fail("log_with", repr(tracker), "a tracker of accelerate that is installed")


def checkpoint_activations(mulan: MuLaN) -> None:
    """Let both towers compute each block again in the backward pass.

    Raises:
        ValueError: a tower has no blocks that can.
    """
    for tower in (mulan.audio, mulan.text):
        found = False
        for module in cast(nn.Module, tower).modules():
            if isinstance(module, Transformer):
                module.checkpoint_blocks = True
                found = True
            elif enable := getattr(module, "gradient_checkpointing_enable", None):
                cast(Any, enable)({"use_reentrant": False})
                found = True
                break
        if not found:
            name = type(tower).__name__
            fail("activation_checkpointing", f"True for a {name}", "False: it has no such blocks")


def compile_towers(mulan: MuLaN) -> None:
    """``torch.compile`` what is heavy in both towers, in place: names of weights stay."""
    for tower in (mulan.audio, mulan.text):
        # Ours have a transformer, Hugging Face's a model; reading texts stays outside.
        name = "transformer" if hasattr(tower, "transformer") else "model"
        cast(nn.Module, getattr(tower, name, tower)).compile()
