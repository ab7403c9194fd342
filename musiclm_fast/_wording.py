"""Wording that messages share."""

from __future__ import annotations


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 sound``, ``1,200 sounds``; ``many`` is the plural where it is not ``noun`` and an s."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"
