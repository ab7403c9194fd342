"""Wording shared by messages."""

from __future__ import annotations


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 sound``, ``1,200 sounds``; ``many`` is an irregular plural."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"
