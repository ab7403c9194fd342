"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell, two spaces apart. A row of one cell is a heading.

    Args:
        rows: of cells.
        left: so many columns are aligned left, the others right.
    """
    columns = zip(*(row for row in rows if len(row) > 1), strict=True)
    widths = [max(map(len, column)) for column in columns]

    def padded(column: int, cell: str) -> str:
        return cell.ljust(widths[column]) if column < left else cell.rjust(widths[column])

    return "\n".join(
        "  ".join(padded(*cell) for cell in enumerate(row)).rstrip() if len(row) > 1 else row[0]
        for row in rows
    )
