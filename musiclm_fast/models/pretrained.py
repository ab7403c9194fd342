"""A MuLaN in a folder: ``model.safetensors``, its weights, and ``config.json``, its architecture.

Nothing in either file is ever executed. ``config.json`` is::

    {"format": 2, "library": "musiclm_fast", "model": mulan_config(model), **extra}
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast._files import atomic_file, seal
from musiclm_fast._optional import require
from musiclm_fast.models.configuration import build, mulan_config

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FORMAT = 2  # 1 is the single file of models.checkpoint.save_checkpoint
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Pretrained:
    """Saves a model as a folder of two files, and builds it from one.

    A mixin of MuLaN, whose class is what is built.
    """

    #: The class whose instances a configuration can rebuild: a subclass may hold more.
    rebuilt_as: ClassVar[type]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """A model with fresh weights from a configuration (see ``models.configuration``).

        Raises:
            CheckpointError: it lacks a part, names a tower's class that is not registered, or a
                class does not accept an argument.
        """
        built: Self = build(cls, config)
        return built

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """A trained model, in evaluation mode on the CPU.

        Args:
            name: a folder that :meth:`save_pretrained` or MuLaNTrainer wrote (such as
                ``results/best``), or ``owner/name`` of such a repository on the Hugging Face Hub.
            revision: branch, tag or commit of the repository.
            local_files_only: of a repository, take only what was downloaded before.

        Raises:
            FileNotFoundError: no such folder, and no such repository can be reached.
            CheckpointError: a file is damaged, or the weights are another architecture's.
            ImportError: huggingface_hub is not installed, where a repository is asked for.
        """
        return cls.from_pretrained_with_extra(
            name, revision=revision, local_files_only=local_files_only
        )[0]

    @classmethod
    def from_pretrained_with_extra(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> tuple[Self, dict[str, Any]]:
        """:meth:`from_pretrained`, and the further entries of ``config.json``."""
        folder = Path(name)
        if folder.is_dir():
            config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        elif folder.exists():
            raise CheckpointError(
                f"name: {os.fspath(name)!r} is a file, expected a folder of MuLaN.save_pretrained; "
                "musiclm_fast.models.checkpoint.load_mulan reads single files too"
            )
        elif not _HUB_NAME.fullmatch(os.fspath(name)):
            raise FileNotFoundError(f"name: no folder {os.fspath(name)!r}")
        else:
            config_file, weights_file = _download(os.fspath(name), revision, local_files_only)
        extra = read_config(config_file)
        model = cls.from_config(extra.pop("model"))
        read_weights(cast(nn.Module, model), weights_file)
        return cast(Self, cast(nn.Module, model).eval()), extra

    def save_pretrained(self, folder: str | os.PathLike[str], **extra: Any) -> None:
        """Write ``model.safetensors`` and ``config.json``, from which :meth:`from_pretrained`
        rebuilds the model; each file atomically.

        Args:
            folder: created if missing; its other files stay.
            extra: further entries of ``config.json``: plain values, such as ``clip_seconds``, the
                length of the clips that the model was trained with.

        Raises:
            OSError: it could not be written; an earlier model in the folder is unchanged.
            TypeError: a tower is of a class that no configuration can rebuild.
        """
        model = cast(nn.Module, self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = config_text(model, extra)
        part = folder / f".{WEIGHTS_FILE}.tmp"
        try:
            # Both are written before either replaces a file: a full disk spoils no earlier model.
            with atomic_file(folder / CONFIG_FILE) as file:
                file.write(config.encode())
                file.flush()
                os.fsync(file.fileno())
                write_weights(model, part)
                seal(part)
                os.replace(part, folder / WEIGHTS_FILE)
        finally:
            part.unlink(missing_ok=True)


def config_text(model: Any, extra: dict[str, Any]) -> str:
    """The content of ``config.json``.

    Raises:
        TypeError: the model is not one that a configuration can rebuild, or an entry is no plain
            value.
        ValueError: an entry has a name that the file needs itself.
    """
    own = {"format": FORMAT, "library": "musiclm_fast", "model": mulan_config(model)}
    if taken := own.keys() & extra.keys():
        raise ValueError(f"extra: got {', '.join(sorted(taken))}, which the file holds already")
    return json.dumps({**own, **extra}, indent=2) + "\n"


def write_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a module's ``state_dict`` as safetensors.

    Raises:
        OSError: it could not be written, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # tied weights are written under each of their names
        storages.add(tensor.untyped_storage().data_ptr())
        weights[name] = tensor
    try:
        save_file(weights, os.fspath(path))
    except SafetensorError as error:  # which stands for the operating system's errors too
        raise OSError(f"{path}: could not be written, is the disk full? ({error})") from error


def _download(name: str, revision: str | None, local_files_only: bool) -> tuple[Path, Path]:
    try:
        require("huggingface_hub")
    except ImportError as error:
        raise ImportError(f"name: no folder {name!r}, and {error}") from error
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config, weights = (
            hf_hub_download(name, file, revision=revision, local_files_only=local_files_only)
            for file in (CONFIG_FILE, WEIGHTS_FILE)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"name: no folder {name!r}, and no such model from the Hugging Face Hub ({reason})"
        ) from error
    return Path(config), Path(weights)


def read_weights(model: nn.Module, path: Path) -> None:
    """Load what :func:`write_weights` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds another architecture's weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {str(path)!r}")
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint: {str(path)!r} is damaged ({error})") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint: {str(path)!r} holds weights of another architecture: "
            f"{' '.join(str(error).split())}"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``: ``model``, for :func:`configuration.build`, and its further entries.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or not such a file.
    """
    if not path.is_file():
        inside = [name for name in ("best", "latest") if (path.parent / name / path.name).is_file()]
        hint = f"; there is one in {str(path.parent / inside[0])!r}" if inside else ""
        raise FileNotFoundError(f"checkpoint: no file {str(path)!r}{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {str(path)!r} is damaged ({error})") from error
    if not isinstance(content, dict) or content.pop("library", None) != "musiclm_fast":
        raise CheckpointError(f"checkpoint: {str(path)!r} is not of musiclm_fast")
    if not isinstance(content.get("model"), dict):
        why = content.get("why", "it has no 'model'")
        raise CheckpointError(f"checkpoint: {str(path)!r} does not say how to build one ({why})")
    if content.pop("format", None) != FORMAT:
        raise CheckpointError(f"checkpoint: {str(path)!r} is not of format {FORMAT}")
    return content
