"""The predictions on file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.predict.model import CARDS

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Cost:
    """The cost of a launch on a card.

    Args:
        name: of the kernel; launches: number of equal ones.
        ms: of one; bound: the limit.
        how: the factors of the time, for a reader to check.
    """

    name: str
    launches: int
    ms: float
    bound: str
    how: str = ""


@dataclass(frozen=True)
class Prediction:
    """A figure of the harvest, or why there is none.

    Args:
        case, contender: of the harvest.
        ms: of one call between events; kernels_ms: of its kernels; launches: their number.
        bound: ``tensor``, ``issue``, ``integer``, ``float``, ``mufu``, ``memory`` (instructions),
            ``bandwidth``, ``launch`` (many short kernels) or ``host``.
        how: the parts of the time; without a figure, the reason.
        kernels: its Triton kernels, equal ones merged.
    """

    case: str
    contender: str
    ms: float | None
    kernels_ms: float | None
    launches: int | None
    bound: str
    how: str
    kernels: Sequence[Cost] = ()


def load(device: str) -> dict[tuple[str, str], Prediction]:
    """The predictions on file for a device by torch's name of it; none for other devices."""
    card = next((c for c in CARDS if c.upper() in re.findall(r"\w+", device.upper())), None)
    if card is None:
        return {}
    found = json.loads((RESULTS / f"{card}-predicted.json").read_text())
    return {(p.case, p.contender): p for p in read(found)}


def read(stored: dict[str, Any]) -> list[Prediction]:
    """The predictions of a file."""
    return [
        Prediction(**{**p, "kernels": [Cost(**k) for k in p["kernels"]]})
        for p in stored["predictions"]
    ]
