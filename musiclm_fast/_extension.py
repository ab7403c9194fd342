"""The compiled library: loaded once, on first use. Without it everything runs on torch alone.

``load()`` raises for a wrong ``MUSICLM_FAST_SIMD`` alone; ``why_missing()`` says why there is no
library and how to get one.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from musiclm_fast._checks import check_choice
from musiclm_fast._compiling import assume_constant_result

OLDEST_TORCH = (2, 11)
SIMD_LEVELS = ("baseline", "avx2", "avx512")
HOW_TO_BUILD = (
    "`pip install .` in a checkout of musiclm_fast, where torch and a C++ compiler are installed"
)

# The ops that csrc/library.cpp declares: a library without one of them is an older build.
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
_WHY_NOT_BUILT = Path(__file__).with_name("why_not_built.txt")  # written by setup.py
_lock = threading.Lock()
_status: ExtensionStatus | None = None
_warned: set[str] = set()


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the compiled library is loaded, or why not.

    Args:
        loaded: the library is loaded and its ops are under ``torch.ops.musiclm_fast``.
        reason: why it is missing; empty when loaded.
        facts: what was built (version, compiler, flags, SIMD levels, CUDA architectures, torch);
            empty where the library does not load.
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


@assume_constant_result
def warn_of_missing_kernels(reason: str) -> None:
    """The first call that would use compiled kernels warns why they are missing."""
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(
        f"musiclm_fast runs without its compiled kernels: {reason} "
        "(MUSICLM_FAST_BACKEND=torch asks for that, without this warning)",
        RuntimeWarning,
        stacklevel=4,
    )


def simd_level() -> str | None:
    """SIMD level that the CPU kernels run at (baseline, avx2, avx512); None without the library."""
    if not load():
        return None
    return _text(_library(), "musiclm_fast_simd_level")


def set_simd_level(name: str) -> None:
    """Run the kernels at another SIMD level; for tests, while no kernel runs.

    Raises:
        ValueError: this processor, or the build, has no such level.
    """
    if _library().musiclm_fast_set_simd_level(name.encode()) != 0:
        raise ValueError(f"name: got {name!r}, expected a SIMD level that this processor has")


def has_avx512_bf16() -> bool:
    """Whether kernels may use AVX512-BF16 instructions."""
    return load() and bool(_library().musiclm_fast_has_avx512_bf16())


def _library() -> ctypes.CDLL:
    if not load():
        raise RuntimeError(why_missing())
    return ctypes.CDLL(str(_LIBRARY))  # once more the library that is loaded


def _text(library: ctypes.CDLL, name: str) -> str:
    function = library[name]
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode()


def _read_facts(library: ctypes.CDLL) -> dict[str, Any]:
    text = _text(library, "musiclm_fast_build_facts")
    facts: dict[str, Any] = dict(line.split("=", 1) for line in text.splitlines())
    return {**facts, **{name: facts[name].split() for name in ("simd_levels", "cuda_archs")}}


def _load() -> ExtensionStatus:
    level = os.environ.get("MUSICLM_FAST_SIMD")
    if level:
        check_choice("MUSICLM_FAST_SIMD", level, SIMD_LEVELS)
    if not _LIBRARY.exists():
        why = f" ({_WHY_NOT_BUILT.read_text().strip()})" if _WHY_NOT_BUILT.exists() else ""
        reason = f"the compiled library is not built{why}; to build it: {HOW_TO_BUILD}"
        return ExtensionStatus(False, reason)
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        reason = f"the compiled library needs torch {oldest} or newer, this is {torch.__version__}"
        return ExtensionStatus(False, reason)
    try:
        library = ctypes.CDLL(str(_LIBRARY))  # its ops register with the torch in this process
        facts = _read_facts(library)
    except (OSError, AttributeError) as error:  # AttributeError: an older build's, without facts
        reason = f"the compiled library does not load ({error}); to build it again: {HOW_TO_BUILD}"
        return ExtensionStatus(False, reason)
    missing = [op for op in OPS if not hasattr(torch.ops.musiclm_fast, op)]
    if missing:
        reason = (
            f"the compiled library is older than the Python files (it lacks {', '.join(missing)}); "
            f"to build it again: {HOW_TO_BUILD}"
        )
        return ExtensionStatus(False, reason, facts)
    best = _text(library, "musiclm_fast_simd_level")
    if level and level != best:
        raise ValueError(f"MUSICLM_FAST_SIMD: got {level!r}, but this processor has {best} at most")
    return ExtensionStatus(True, "", facts)
