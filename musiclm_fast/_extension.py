"""The compiled library: loaded once, on first use. Without it everything runs on torch alone.

``load()`` never raises; ``why_missing()`` says why there is no library and how to get one.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

OLDEST_TORCH = (2, 11)
SIMD_LEVELS = ("baseline", "avx2", "avx512")
# in a checkout of the project
HOW_TO_BUILD = "pip install cmake ninja pybind11 && pip install --no-build-isolation ."

# What csrc/library.cpp declares: a library without one of these is an older build's.
OPS = (
    "attention_forward",
    "attention_backward",
    "contrastive_logsumexp",
    "contrastive_logsumexp_backward",
    "contrastive_sigmoid",
    "decode_pack",
    "decode_step",
    "geglu_norm_forward",
    "geglu_norm_backward",
    "hyper_connection_forward",
    "hyper_connection_backward",
    "spectrogram_forward",
    "spectrogram_backward",
)

_LIBRARY = Path(__file__).with_name("libmusiclm_fast_ops.so")
_lock = threading.Lock()
_status: ExtensionStatus | None = None


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the compiled library is loaded, or why not.

    Args:
        loaded: the library is loaded and its ops are under ``torch.ops.musiclm_fast``.
        reason: why it is missing; empty when loaded.
        facts: what was built (version, compiler, flags, SIMD levels, CUDA architectures, torch);
            empty where nothing was built for this Python.
    """

    loaded: bool
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


def load() -> bool:
    """Load the compiled library if that was not tried yet; True if it is loaded."""
    return extension_status().loaded


def why_missing() -> str:
    """Why the compiled library is missing, in one line; empty if it is loaded."""
    return extension_status().reason


def extension_status() -> ExtensionStatus:
    """The compiled library's state; the first call loads it."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


def simd_level() -> str | None:
    """SIMD level that the CPU kernels run at (baseline, avx2, avx512); None without the library."""
    if not load():
        return None
    from musiclm_fast import _C

    return _C.simd_level()


def _load() -> ExtensionStatus:
    try:
        from musiclm_fast import _C
    except ImportError as error:
        built = ", ".join(sorted(file.name for file in _LIBRARY.parent.glob("_C.*.so")))
        state = f"does not load ({error}; there is {built})" if built else "is not built"
        return ExtensionStatus(False, f"the compiled library {state}; to build it: {HOW_TO_BUILD}")
    facts = _C.build_facts()
    level = os.environ.get("MUSICLM_FAST_SIMD")
    if level and level not in SIMD_LEVELS:
        reason = f"MUSICLM_FAST_SIMD: got {level!r}, expected one of {', '.join(SIMD_LEVELS)}"
        return ExtensionStatus(False, reason, facts)
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        reason = f"the compiled library needs torch {oldest} or newer, this is {torch.__version__}"
        return ExtensionStatus(False, reason, facts)
    try:
        _C.load_ops(str(_LIBRARY))
    except RuntimeError as error:
        reason = f"the compiled library does not load ({error}); to build it again: {HOW_TO_BUILD}"
        return ExtensionStatus(False, reason, facts)
    missing = [op for op in OPS if not hasattr(torch.ops.musiclm_fast, op)]
    if missing:
        reason = (
            f"the compiled library is older than the Python files (it lacks {', '.join(missing)}); "
            f"to build it again: {HOW_TO_BUILD}"
        )
        return ExtensionStatus(False, reason, facts)
    if level and level != _C.simd_level():
        reason = f"MUSICLM_FAST_SIMD={level}, but this processor has {_C.simd_level()} at most"
        return ExtensionStatus(False, reason, facts)
    return ExtensionStatus(True, "", facts)
