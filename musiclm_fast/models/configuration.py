"""A MuLaN's architecture as plain values: what a checkpoint holds beside the weights.

::

    {"audio": {"class": "AudioSpectrogramTransformer", **arguments},
     "text": {"class": "TextTransformer", **arguments},
     "mulan": arguments}

A tower's class is one of a registry, found by name, so a configuration names no code of its own.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from torch import nn

from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast._checks import check_choice, fail
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.front_end import FrontEnd
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.text_tower import TextTransformer

DEFAULT_TOWERS = {"audio": "AudioSpectrogramTransformer", "text": "TextTransformer"}


# kind of tower, class name: the class, or the module of this package that registers it
_TOWERS: dict[str, dict[str, type[nn.Module] | str]] = {
    "audio": {
        "AudioSpectrogramTransformer": AudioSpectrogramTransformer,
        "HuggingFaceAudio": "musiclm_fast.models.hugging_face",
    },
    "text": {
        "TextTransformer": TextTransformer,
        "HuggingFaceText": "musiclm_fast.models.hugging_face",
    },
}


class Tower(Protocol):
    """What a tower has so that a configuration can rebuild it."""

    arguments: dict[str, Any]  # plain values; cls(**arguments) is the tower with fresh weights


def register_tower(kind: str, tower: type[nn.Module]) -> type[nn.Module]:
    """Let configurations hold towers of a class of one's own, by the class's name.

    Args:
        kind: ``"audio"`` or ``"text"``.
        tower: a class whose instances have ``arguments``, plain values with which
            ``tower(**arguments)`` builds the same architecture anew. ``models.arguments``'s
            ``record_arguments`` makes them for most classes.

    Raises:
        ValueError: another kind, or a name that belongs to another class.
    """
    check_choice("kind", kind, _TOWERS)
    known = _TOWERS[kind].get(tower.__name__)
    if not (known is None or known is tower or isinstance(known, str)):
        fail("tower", tower.__qualname__, f"another name: {tower.__name__} is taken")
    _TOWERS[kind][tower.__name__] = tower
    return tower


def tower_class(kind: str, name: str) -> type[nn.Module]:
    """The class of a registered tower.

    Raises:
        ValueError: there is none of that name.
    """
    check_choice(f"{kind}.class", name, _TOWERS[kind])
    found = _TOWERS[kind][name]
    if isinstance(found, str):
        importlib.import_module(found)
        found = _TOWERS[kind][name]
    return cast("type[nn.Module]", found)


def mulan_config(model: MuLaN) -> dict[str, Any]:
    """The constructor arguments of a MuLaN and its towers, as plain values.

    Raises:
        TypeError: the model is not a MuLaN, or a tower's class is not registered.
    """
    if type(model) is not MuLaN:
        raise TypeError(f"model: got {type(model).__name__}, expected musiclm_fast.MuLaN")
    config = {kind: _tower_config(kind, getattr(model, kind)) for kind in _TOWERS}
    return {**config, "mulan": dict(model.arguments)}


def _tower_config(kind: str, tower: nn.Module) -> dict[str, Any]:
    name = type(tower).__name__
    if _TOWERS[kind].get(name) is not type(tower):
        names = " or ".join(_TOWERS[kind])
        raise TypeError(
            f"model.{kind}: got {name}, expected {names}, or a class given to "
            "musiclm_fast.models.configuration.register_tower"
        )
    return {"class": name, **cast(Tower, tower).arguments}


def build_mulan(config: dict[str, Any]) -> MuLaN:
    """A MuLaN with fresh weights from :func:`mulan_config`'s result.

    A tower without a ``class`` is musiclm_fast's own, as in checkpoints of earlier versions.

    Raises:
        CheckpointError: the configuration lacks a part, names a class that is not registered, or
            a class does not accept an argument.
    """
    try:
        towers = [_build_tower(kind, dict(config[kind])) for kind in _TOWERS]
        return MuLaN(*towers, **config["mulan"])  # type: ignore[arg-type]
    except KeyError as error:
        raise CheckpointError(f"config: no part {error}, expected audio, text and mulan") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config: cannot build the model: {error}") from error


def _build_tower(kind: str, arguments: dict[str, Any]) -> nn.Module:
    tower = tower_class(kind, arguments.pop("class", DEFAULT_TOWERS[kind]))
    if isinstance(arguments.get("front_end"), dict):
        arguments["front_end"] = FrontEnd(**arguments["front_end"])
    if isinstance(arguments.get("patch_size"), list):  # JSON has no tuples
        arguments["patch_size"] = tuple(arguments["patch_size"])
    return tower(**arguments)
