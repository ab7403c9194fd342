"""AudioLM's three stages on the fused attention, with audiolm-pytorch's names and checkpoints.

Each name is imported at its first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "AudioLM": "audio_lm",
    "CoarseTransformer": "coarse",
    "CoarseTransformerWrapper": "wrappers.coarse",
    "EncodecWrapper": "encodec",
    "FineTransformer": "fine",
    "FineTransformerWrapper": "wrappers.fine",
    "HubertWithKmeans": "hubert",
    "MelCodec": "mel_codec",
    "MelKmeans": "mel_kmeans",
    "Sampling": "sampling",
    "SemanticTransformer": "semantic",
    "SemanticTransformerWrapper": "wrappers.semantic",
}

# Trainers are in a layer above this package. Upstream exports their names here.
_TRAINERS = (
    "CoarseTransformerTrainer",
    "FineTransformerTrainer",
    "SemanticTransformerTrainer",
    "SoundFolder",
)

__all__ = [
    "AudioLM",
    "CoarseTransformer",
    "CoarseTransformerTrainer",
    "CoarseTransformerWrapper",
    "EncodecWrapper",
    "FineTransformer",
    "FineTransformerTrainer",
    "FineTransformerWrapper",
    "HubertWithKmeans",
    "MelCodec",
    "MelKmeans",
    "Sampling",
    "SemanticTransformer",
    "SemanticTransformerTrainer",
    "SemanticTransformerWrapper",
    "SoundFolder",
]


def __getattr__(name: str) -> Any:
    if name in _TRAINERS:
        home = "musiclm_fast.training.stages"
    elif name in _HOMES:
        home = f"{__name__}.{_HOMES[name]}"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_TRAINERS])
