"""Optional packages: imported on use; if missing, an error names the command to install them."""

from __future__ import annotations

import importlib
from typing import Any

# import name: what needs it, its name for pip, the extra of pyproject.toml that has it
PACKAGES = {
    "accelerate": ("training", "accelerate", "train"),
    "huggingface_hub": ("a name on the Hugging Face Hub", "huggingface_hub", "pretrained"),
    "joblib": ("the k-means of HubertWithKmeans", "joblib", "audiolm"),
    "lion_pytorch": ("the optimizer lion", "lion-pytorch", "train"),
    "matplotlib": ("drawing pictures", "matplotlib", "demo"),
    "sklearn": ("t-SNE", "scikit-learn", "eval"),
    "soundfile": ("reading and writing sound files", "soundfile", "train"),
    "soxr": ("changing the sample rate", "soxr", "train"),
    "transformers": ("a pretrained model", "transformers", "pretrained"),
    "yaml": ("a configuration", "pyyaml", "train"),
}


def missing(name: str, error: ImportError | None = None) -> ImportError:
    """The error to raise if optional package ``name`` is missing, or failed with ``error``."""
    what, package, extra = PACKAGES[name]
    gone = error is None or (isinstance(error, ModuleNotFoundError) and error.name == name)
    why = "is not installed" if gone else f"does not import ({error})"
    how = f"pip install {package}, or in a checkout pip install '.[{extra}]'"
    return ImportError(f"{what} needs {package}, which {why}: {how}", name=name)


def require(name: str) -> Any:
    """Import an optional package.

    Raises:
        ImportError: it cannot be imported; the message names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing(name, error) from error


def transformers_class(name: str) -> Any:
    """A class of transformers by name.

    transformers imports torchaudio if it is installed, though nothing here needs it. A torchaudio
    that was built for another torch fails to load; transformers is then told that it is not
    installed.

    Raises:
        ImportError: transformers is not installed.
    """
    require("transformers")
    utils = importlib.import_module("transformers.utils")
    try:
        importlib.import_module("torchaudio")
    except ImportError:
        pass
    except (OSError, RuntimeError):
        for module in (utils, importlib.import_module("transformers.utils.import_utils")):
            vars(module)["is_torchaudio_available"] = lambda: False
    return getattr(importlib.import_module("transformers"), name)
