"""Upstream, live: the real musiclm-pytorch and audiolm-pytorch, importable on any machine.

Neither package imports as published: fairseq does not install on Python 3.11, torchaudio's binary
insists on one CUDA build of torch, x-clip imports torchvision for a module nobody uses here. None
of the three is needed for what we compare, so :func:`load` puts stand-ins in their place for the
duration of the import and undoes every global effect the import has::

    from tests.upstream import live

    upstream = live.load()
    mulan = upstream.musiclm.MuLaN(...)

    both = live.pair(lambda package: package.TextTransformer(dim=64, depth=2))
    both.upstream, both.ours  # equal weights

Tests use the ``upstream`` fixture instead, which skips where the packages are not installed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

VERSIONS = {"musiclm-pytorch": "0.2.8", "audiolm-pytorch": "2.4.0"}
T5_V1_1_BASE_DIM = 768  # what get_encoded_dim would download a configuration to find out

# torch and the packages whose absence would surface only in the middle of the import
_REQUIRED = (
    "musiclm_pytorch",
    "audiolm_pytorch",
    "x_clip",
    "torchaudio",
    "accelerate",
    "beartype",
    "einops",
    "ema_pytorch",
    "encodec",
    "ftfy",
    "gateloop_transformer",
    "hyper_connections",
    "joblib",
    "lion_pytorch",
    "local_attention",
    "pytorch_warmup",
    "regex",
    "sentencepiece",
    "sklearn",
    "tqdm",
    "transformers",
    "vector_quantize_pytorch",
    "wandb",
)


class UpstreamMissing(ImportError):
    """Upstream's packages, or the versions we compare with, are not installed."""


@dataclass(frozen=True)
class Upstream:
    """Upstream's modules.

    ``musiclm`` and ``audiolm`` are the packages; ``core`` is ``musiclm_pytorch.musiclm_pytorch``,
    where the classes are defined and their globals live; ``tokenizer`` is x-clip's.
    """

    musiclm: ModuleType
    audiolm: ModuleType
    core: ModuleType
    tokenizer: Any


@cache
def load() -> Upstream:
    """Import upstream's packages, with stand-ins for what they cannot import.

    Returns:
        The modules. Warnings and the root logger are as they were before the call.

    Raises:
        UpstreamMissing: a package is absent or of another version.
    """
    _check_installed()
    with _global_effects_undone():
        # stays: a loaded torchaudio goes on asking for it
        sys.modules.setdefault("torchaudio._extension", _torchaudio_extension())
        with _stand_in(_module("fairseq")):
            audiolm = importlib.import_module("audiolm_pytorch")
        # transformers, imported by now, looks for torchvision to decide what it offers: it must
        # not see the stand-in
        transforms = _module("torchvision.transforms")
        utils = _module("torchvision.utils", save_image=_unavailable)
        torchvision = _module("torchvision", __path__=[], transforms=transforms, utils=utils)
        with _stand_in(torchvision, transforms, utils):
            musiclm = importlib.import_module("musiclm_pytorch")
    stages = importlib.import_module("audiolm_pytorch.audiolm_pytorch")
    stages.get_encoded_dim = lambda name: T5_V1_1_BASE_DIM
    core = importlib.import_module("musiclm_pytorch.musiclm_pytorch")
    core.posemb_sincos_2d = _in_own_dtype(core.posemb_sincos_2d)
    return Upstream(
        musiclm=musiclm,
        audiolm=audiolm,
        core=core,
        tokenizer=importlib.import_module("x_clip.tokenizer").tokenizer,
    )


@dataclass(frozen=True)
class Pair:
    """One model built by both packages, with equal weights."""

    upstream: nn.Module
    ours: nn.Module

    def oracle(self) -> nn.Module:
        """A float64 copy of upstream's model."""
        model = copy.deepcopy(self.upstream).double()
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "dynamic_pos_bias_mlp":
                # it is handed float32 offsets whatever its weights' dtype
                module.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        return model


def pair(build: Callable[[ModuleType], nn.Module], seed: int = 0) -> Pair:
    """Build one model with upstream and with musiclm_fast and give both the same weights.

    Parameters that start as a constant (norms, temperatures, query and key scales) get 10% of
    noise first: a scale that is used twice, or not at all, shows only when it is not one.

    Args:
        build: makes the model from a package's public names, ``build(musiclm_pytorch)`` and
            ``build(musiclm_fast)``.
        seed: of the initial weights.

    Returns:
        Both models, in training mode as constructed. The weights travel by a strict
        ``load_state_dict``, so the keys and shapes are equal too.
    """
    musiclm_fast = importlib.import_module("musiclm_fast")
    torch.manual_seed(seed)
    upstream = build(load().musiclm)
    with torch.no_grad():
        for parameter in nn.Module.parameters(upstream):  # the quantizer's own yields a part
            if (parameter == parameter.flatten()[0]).all():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    ours = build(musiclm_fast)
    ours.load_state_dict(upstream.state_dict(), strict=True)
    return Pair(upstream, ours)


def run_script(script: str, *arguments: str) -> str:
    """Standard output of ``script`` in an interpreter of its own, started at the project's root.

    Raises:
        AssertionError: it failed; with its standard error.
    """
    command = [sys.executable, "-c", script, *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _check_installed() -> None:
    absent = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if absent:
        raise UpstreamMissing(f"upstream needs {', '.join(absent)}, not installed here")
    for name, wanted in VERSIONS.items():
        if (found := metadata.version(name)) != wanted:
            raise UpstreamMissing(f"upstream needs {name} {wanted}, found {found}")


@contextmanager
def _stand_in(*modules: ModuleType) -> Iterator[None]:
    """``modules`` in ``sys.modules`` for the duration of the block; first names the package.

    Does nothing where the real package imports. Taken away afterwards: whoever asks later whether
    such a package is installed hears the truth.
    """
    if _importable(modules[0].__name__):
        modules = ()
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for module in modules:
            del sys.modules[module.__name__]


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ):  # absent, or built for another torch
        return False
    return True


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name, "Stand-in for a package that the comparison does not need.")
    vars(module).update(attributes)
    return module


def _unavailable(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("called into a stand-in for a package that is not installed")


def _torchaudio_extension() -> ModuleType:
    """Says that the binary part is absent; what torchaudio does in Python works without it."""
    return _module(
        "torchaudio._extension",
        _IS_TORCHAUDIO_EXT_AVAILABLE=False,
        _IS_ALIGN_AVAILABLE=False,
        _load_lib=lambda name: False,
        _check_cuda_version=_unavailable,
        fail_if_no_align=lambda function: _unavailable,
    )


def _in_own_dtype(position_embedding: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Upstream's sin-cos embedding computes in the default dtype whatever it is given.

    In float64 it would then be a float32 embedding, and the oracle no oracle. For float32 nothing
    changes.
    """

    def in_own_dtype(patches: Tensor) -> Tensor:
        default = torch.get_default_dtype()
        torch.set_default_dtype(patches.dtype)
        try:
            return position_embedding(patches)
        finally:
            torch.set_default_dtype(default)

    return in_own_dtype


@contextmanager
def _global_effects_undone() -> Iterator[None]:
    """audiolm's import makes ``warnings.warn`` a no-op and quietens the root logger."""
    warn, level = warnings.warn, logging.root.level
    try:
        yield
    finally:
        warnings.warn = warn
        logging.root.setLevel(level)
