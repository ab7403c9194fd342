"""The style of all figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from musiclm_fast._files import atomic_file
from musiclm_fast._optional import require

INK, LINE, ACCENT, MUTED = "#222222", "#2a6f97", "#c8553d", "#8a8a8a"


def pyplot() -> Any:
    """matplotlib.pyplot in one style for all figures, without a display."""
    require("matplotlib").use("Agg")  # no display is needed, independent of the environment
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "savefig.dpi": 130,
            "figure.constrained_layout.use": True,
            "savefig.bbox": "tight",
        }
    )
    return plt


def save_figure(plt: Any, figure: Any, path: Path, **options: Any) -> Path:
    """Write a figure as PNG, atomically, and close it."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", **options)
    plt.close(figure)
    return path
