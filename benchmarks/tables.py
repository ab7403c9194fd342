"""Tables as markdown and for a terminal.

tabulate and rich print such tables too. A harvest has neither: it runs on a machine with torch,
Triton, pytest and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from musiclm_fast import _tables


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; a pipe inside a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned left, see :func:`musiclm_fast._tables.aligned`."""
    return _tables.aligned(rows, left=max(map(len, rows)))


END = "<!-- end -->\n"


def replace(page: Path, marker: str, text: str) -> None:
    """Put a text between a page's line ``marker`` and the next ``END``."""
    whole = page.read_text()
    old = between(whole, marker, page)
    page.write_text(whole.replace(f"{marker}{old}{END}", f"{marker}{text}\n{END}"))


def between(whole: str, marker: str, page: Path) -> str:
    """What is between a line ``marker`` and the next ``END``.

    Raises:
        ValueError: the page has no such lines.
    """
    _, found, rest = whole.partition(marker)
    old, ended, _ = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{page}: expected the lines {marker.strip()} and {END.strip()}")
    return old
