"""AudioLM's three stages on the fused attention: audiolm-pytorch's names and checkpoints.

Importing loads nothing heavy: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AudioLM": "audio_lm",
    "CoarseTransformer": "coarse",
    "CoarseTransformerWrapper": "wrappers",
    "FineTransformer": "fine",
    "FineTransformerWrapper": "wrappers",
    "Sampling": "sampling",
    "SemanticTransformer": "semantic",
    "SemanticTransformerWrapper": "wrappers",
}

__all__ = [
    "AudioLM",
    "CoarseTransformer",
    "CoarseTransformerWrapper",
    "FineTransformer",
    "FineTransformerWrapper",
    "Sampling",
    "SemanticTransformer",
    "SemanticTransformerWrapper",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
