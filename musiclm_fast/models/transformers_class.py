"""Classes of transformers, wherever they can be had."""

from __future__ import annotations

import importlib
from typing import Any

from musiclm_fast._optional import require


def transformers_class(name: str) -> Any:
    """A class of transformers by name.

    transformers imports torchaudio wherever that is installed, for files it never opens here. A
    torchaudio that was built for another torch fails to load; transformers is then told that
    there is none.

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
