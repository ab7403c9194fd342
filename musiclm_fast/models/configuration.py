"""A MuLaN's architecture as plain values, saved in a checkpoint with the weights.

::

    {"audio": {"class": "AudioSpectrogramTransformer", **arguments},
     "text": {"class": "TextTransformer", **arguments},
     "mulan": arguments}

A tower's class is looked up by name in a registry, so a configuration cannot name other code.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast._checks import check_choice
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.front_end import RENAMED_PRESETS, FrontEnd
from musiclm_fast.models.text_tower import TextTransformer
from musiclm_fast.models.towers import KINDS, register_tower, registered, tower_config

DEFAULT_TOWERS = {"audio": "AudioSpectrogramTransformer", "text": "TextTransformer"}
# Towers that are registered on first use: their module needs transformers.
_ON_DEMAND = {
    "audio": {"HuggingFaceAudio": "musiclm_fast.models.hugging_face_audio"},
    "text": {"HuggingFaceText": "musiclm_fast.models.hugging_face_text"},
}
register_tower("audio", AudioSpectrogramTransformer)
register_tower("text", TextTransformer)


def tower_class(kind: str, name: str) -> type[nn.Module]:
    """The class of a registered tower.

    Raises:
        ValueError: no class has that name.
    """
    known = registered(kind)
    check_choice(f"{kind}.class", name, [*(known.keys() | _ON_DEMAND[kind].keys())])
    if name not in known:
        importlib.import_module(_ON_DEMAND[kind][name])
    return registered(kind)[name]


def mulan_config(model: Any) -> dict[str, Any]:
    """The constructor arguments of a MuLaN and its towers, as plain values.

    Raises:
        TypeError: the model is not a MuLaN, or a tower's class is not registered.
    """
    if getattr(model, "rebuilt_as", None) is not type(model):
        raise TypeError(f"model: got {type(model).__name__}, expected musiclm_fast.MuLaN")
    config = {kind: tower_config(kind, getattr(model, kind)) for kind in KINDS}
    return {**config, "mulan": dict(model.arguments)}


def with_current_names(config: Any) -> Any:
    """A saved configuration with the current name of its front end's preset."""
    match config:
        case {"audio": {"front_end": str(name)} as audio} if name in RENAMED_PRESETS:
            return {**config, "audio": {**audio, "front_end": RENAMED_PRESETS[name]}}
    return config


def build_towers(config: dict[str, Any]) -> list[nn.Module]:
    """The two towers of a configuration, audio first, with fresh weights.

    A tower without a ``class`` is musiclm_fast's own, as in checkpoints of earlier versions.

    Raises:
        KeyError: the configuration lacks a part.
        TypeError, ValueError: a class is not registered, or does not accept an argument.
    """
    return [_build_tower(kind, dict(config[kind])) for kind in KINDS]


def _build_tower(kind: str, arguments: dict[str, Any]) -> nn.Module:
    tower = tower_class(kind, arguments.pop("class", DEFAULT_TOWERS[kind]))
    if isinstance(arguments.get("front_end"), dict):
        arguments["front_end"] = FrontEnd(**arguments["front_end"])
    if isinstance(arguments.get("patch_size"), list):  # JSON has no tuples
        arguments["patch_size"] = tuple(arguments["patch_size"])
    return tower(**arguments)


def build(cls: Any, config: dict[str, Any]) -> Any:
    """An instance of ``cls``, a MuLaN, with fresh weights from :func:`mulan_config`'s result.

    Raises:
        CheckpointError: the configuration lacks a part, names a class that is not registered, or
            a class does not accept an argument.
    """
    config = with_current_names(config)
    try:
        return cls(*build_towers(config), **config["mulan"])
    except KeyError as error:
        raise CheckpointError(f"config: no part {error}, expected audio, text and mulan") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config: cannot build the model: {error}") from error
