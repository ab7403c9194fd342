"""Remembers the arguments a model was built with, so that a checkpoint can rebuild it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, ParamSpec

from torch import nn

P = ParamSpec("P")


def record_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a module's ``__init__``: ``self.arguments`` then holds what it was called with.

    Defaults are included, submodules are left out (they record their own), dataclasses become
    dictionaries, so the result holds plain values that a weights-only checkpoint may carry.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording(*args: P.args, **kwargs: P.kwargs) -> None:
        init(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        module, *values = bound.arguments.items()
        arguments: dict[str, Any] = {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in values
            if not isinstance(value, nn.Module)
        }
        setattr(module[1], "arguments", arguments)  # noqa: B010 (self is a P.args value here)

    return recording
