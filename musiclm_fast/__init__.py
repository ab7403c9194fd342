"""A fast drop-in for musiclm-pytorch: MuLaN, its towers and losses, the quantizer and MusicLM.

Importing loads nothing heavy: each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from musiclm_fast import _moved
from musiclm_fast._version import __version__

if TYPE_CHECKING:
    from musiclm_fast.interop.alias import install_as_musiclm_pytorch
    from musiclm_fast.interop.convert import from_upstream
    from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
    from musiclm_fast.models.front_end import FrontEnd
    from musiclm_fast.models.hugging_face_audio import HuggingFaceAudio
    from musiclm_fast.models.hugging_face_text import HuggingFaceText
    from musiclm_fast.models.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
    from musiclm_fast.models.mulan import MuLaN
    from musiclm_fast.models.quantizer import MuLaNEmbedQuantizer
    from musiclm_fast.models.text_tower import TextTransformer
    from musiclm_fast.musiclm.musiclm import MusicLM
    from musiclm_fast.training.mulan import MuLaNTrainer

_moved.install()

_HOMES = {
    "AudioSpectrogramTransformer": "models.audio_tower",
    "FrontEnd": "models.front_end",
    "HuggingFaceAudio": "models.hugging_face_audio",
    "HuggingFaceText": "models.hugging_face_text",
    "MuLaN": "models.mulan",
    "MuLaNEmbedQuantizer": "models.quantizer",
    "MuLaNTrainer": "training.mulan",
    "MusicLM": "musiclm.musiclm",
    "SigmoidContrastiveLearning": "models.losses",
    "SoftmaxContrastiveLearning": "models.losses",
    "TextTransformer": "models.text_tower",
    "from_upstream": "interop.convert",
    "install_as_musiclm_pytorch": "interop.alias",
}

__all__ = [
    "AudioSpectrogramTransformer",
    "FrontEnd",
    "HuggingFaceAudio",
    "HuggingFaceText",
    "MuLaN",
    "MuLaNEmbedQuantizer",
    "MuLaNTrainer",
    "MusicLM",
    "SigmoidContrastiveLearning",
    "SoftmaxContrastiveLearning",
    "TextTransformer",
    "__version__",
    "from_upstream",
    "install_as_musiclm_pytorch",
]


# Kept until the release after 0.1.0.
_RENAMED = {"from_reference": "from_upstream", "install_as_reference": "install_as_musiclm_pytorch"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"{__name__}.{name} is now {__name__}.{_RENAMED[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
