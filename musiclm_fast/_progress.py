"""Progress bars that suit a terminal and a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """A tqdm bar: live on a terminal, occasional lines in a log file."""
    live = sys.stderr.isatty()
    return tqdm(iterable, mininterval=0.2 if live else 10.0, dynamic_ncols=live, **options)
