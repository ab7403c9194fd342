"""The base class that audiolm-pytorch requires of an audio conditioner."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from torch import nn

_NAME = "audiolm_pytorch.utils"


def audio_conditioner_base() -> type[nn.Module]:
    """audiolm-pytorch's ``AudioConditionerBase`` if that package is installed, else ``nn.Module``.

    audiolm-pytorch checks ``isinstance(conditioner, AudioConditionerBase)``, but importing the
    package also imports fairseq. The class is defined in a file that needs only torch, so this
    function loads that file by path under its module name. A later import of the package finds the
    module there, so both packages use the same class in either order of import.
    """
    if _NAME not in sys.modules:
        try:
            package = importlib.util.find_spec("audiolm_pytorch")
        except (ImportError, ValueError):
            package = None
        for folder in (package.submodule_search_locations or ()) if package else ():
            file = Path(folder) / "utils.py"
            spec = importlib.util.spec_from_file_location(_NAME, file)
            if file.is_file() and spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules[_NAME] = module
                break
    base = getattr(sys.modules.get(_NAME), "AudioConditionerBase", None)
    return base if isinstance(base, type) else nn.Module


AudioConditionerBase = audio_conditioner_base()
