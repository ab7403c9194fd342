"""Tables as markdown and for a terminal.

tabulate and rich print such tables too. A harvest has neither: it runs on a machine with torch,
Triton, pytest and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
