"""Existing scripts run unchanged: ``import musiclm_pytorch`` resolves to this package."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_SUBMODULES = {
    "musiclm_pytorch": "musiclm_fast",
    "musiclm_pytorch.musiclm_pytorch": "musiclm_fast",
    "musiclm_pytorch.trainer": "musiclm_fast.training.mulan",
}


class _Alias(ModuleType):
    """A module whose attributes are another module's."""

    def __init__(self, name: str, target: str) -> None:
        super().__init__(name, doc=f"{name}, provided by {target}.")
        self.__dict__["_target"] = target
        self.__path__: list[str] = []

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__all__":
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.__dict__["_target"]), attribute)


def install_as_musiclm_pytorch() -> None:
    """Make ``import musiclm_pytorch`` resolve to this package in this process.

    An existing script needs only this line before its imports:
    ``import musiclm_fast; musiclm_fast.install_as_musiclm_pytorch()``.

    Raises:
        RuntimeError: the real musiclm_pytorch is already imported.
    """
    loaded = sys.modules.get("musiclm_pytorch")
    if loaded is not None and not isinstance(loaded, _Alias):
        raise RuntimeError(
            "install_as_musiclm_pytorch: musiclm_pytorch is already imported; call this first"
        )
    for name, target in _SUBMODULES.items():
        sys.modules[name] = _Alias(name, target)
    package = sys.modules["musiclm_pytorch"]
    for name in _SUBMODULES:
        parent, _, child = name.rpartition(".")
        if parent:
            package.__dict__[child] = sys.modules[name]
