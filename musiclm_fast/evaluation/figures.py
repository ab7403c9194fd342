"""Figures of an evaluation: similarities, ranks and a map of the embeddings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._optional import require
from musiclm_fast._plotting import ACCENT, LINE, MUTED, pyplot, save_figure
from musiclm_fast._wording import plural

if TYPE_CHECKING:
    from musiclm_fast.evaluation.report import Report

_SHOWN = 200  # sounds of the similarity picture


_MAPPED = 2000  # sounds of the map


def write_all(report: Report, folder: Path, method: str = "auto") -> list[Path]:
    """Write ``similarity.png``, ``ranks.png`` and ``map.png``; returns their paths."""
    return [
        similarity(report, folder),
        ranks(report, folder),
        embedding_map(report, folder, method),
    ]


def _evenly(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def similarity(report: Report, folder: Path) -> Path:
    """Cosine similarities of sounds and the first caption of each; the diagonal is correct."""
    plt = pyplot()
    some = _evenly(len(report.names), _SHOWN)
    first = dict(reversed(report.pairs.tolist()))  # sound: its first caption
    captions = torch.tensor([first[sound] for sound in some.tolist()])
    matrix = (report.audio[some] @ report.text[captions].t()).numpy()
    side = 6.5
    figure, axis = plt.subplots(figsize=(side + 0.8, side))
    limit = max(float(np.abs(matrix).max()), 1e-6)
    shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    if len(some) <= 40:
        axis.set_yticks(range(len(some)), [report.names[i][-28:] for i in some], fontsize=6)
        titles = [report.texts[i][:28] for i in captions]
        axis.set_xticks(range(len(some)), titles, fontsize=6, rotation=90)
    axis.tick_params(length=0)
    axis.set_xlabel("caption")
    axis.set_ylabel("sound")
    every = plural(len(report.names), "sound")
    of = f"{len(some)} of {every}" if len(some) < len(report.names) else every
    axis.set_title(f"cosine similarity, {of}; the diagonal is correct", loc="left")
    figure.colorbar(shown, ax=axis, shrink=0.5, pad=0.02)
    return save_figure(plt, figure, folder / "similarity.png")


def ranks(report: Report, folder: Path) -> Path:
    """Distribution of ranks in both directions, with that of chance."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    ways = (("audio to text", report.audio_to_text), ("text to audio", report.text_to_audio))
    for axis, (title, found) in zip(axes, ways, strict=True):
        edges = np.unique(np.geomspace(1, found.candidates + 1, 25).round())
        counts, _ = np.histogram(found.ranks.numpy(), edges)
        share = counts / len(found.ranks)
        axis.stairs(share, edges, color=LINE, fill=True, alpha=0.6)
        chance = np.diff(edges) / found.candidates
        axis.stairs(chance, edges, color=ACCENT, linestyle="--", label="chance (one right answer)")
        axis.axvline(found.median_rank, color=MUTED, linewidth=1, label="median")
        axis.set_xscale("log")
        axis.set_xlabel("rank of the nearest right answer")
        axis.set_ylabel("share of queries")
        axis.set_title(f"{title}: recall@10 {found.recall[10]:.1%}", loc="left")
    axes[1].legend(frameon=False)
    return save_figure(plt, figure, folder / "ranks.png")


def embedding_map(report: Report, folder: Path, method: str = "auto") -> Path:
    """Sounds and captions in two dimensions; with labels, the sounds of the ten most common."""
    plt = pyplot()
    some = _evenly(len(report.names), _MAPPED)
    captions = _evenly(len(report.texts), _MAPPED)
    both = torch.cat([report.audio[some], report.text[captions]])
    places, how = project(both, method)
    sounds, texts = places[: len(some)], places[len(some) :]
    figure, axis = plt.subplots(figsize=(7.5, 6.5))
    axis.scatter(*texts.T, s=10, color=MUTED, marker="x", linewidths=0.6, label="captions")
    plain = LINE if report.label_table is None else "#c5d3dd"
    axis.scatter(*sounds.T, s=9, color=plain, label="sounds")
    if report.label_table is not None:
        table = report.label_table[some].numpy()
        common = np.argsort(-table.sum(axis=0), kind="stable")[:10]
        colours = plt.get_cmap("tab10").colors
        for colour, label in zip(colours, common, strict=False):
            own = sounds[table[:, label]]
            axis.scatter(*own.T, s=12, color=colour, label=report.label_names[label])
    axis.set_xticks([])
    axis.set_yticks([])
    counts = f"{plural(len(some), 'sound')} and {plural(len(captions), 'caption')}"
    axis.set_title(f"embeddings of {counts}, {how}")
    axis.legend(frameon=False, fontsize=7, markerscale=1.5)
    return save_figure(plt, figure, folder / "map.png")


def project(vectors: Tensor, method: str = "auto") -> tuple[np.ndarray, str]:
    """Vectors ``(n, d)`` in two dimensions ``(n, 2)``, and the method's name.

    Args:
        vectors: at least two.
        method: ``"pca"``, ``"tsne"`` or ``"auto"``, see :meth:`evaluate.write_report`.

    Raises:
        ImportError: scikit-learn is not installed and ``"tsne"`` was asked for.
    """
    installed = importlib.util.find_spec("sklearn") is not None
    if method == "tsne":
        require("sklearn")
    x = vectors.double()
    x = x - x.mean(dim=0)
    if method == "pca" or not installed or len(x) < 10:
        u, s, _ = torch.linalg.svd(x, full_matrices=False)
        places = torch.zeros(len(x), 2, dtype=torch.float64)
        found = (u * s)[:, :2]
        places[:, : found.shape[1]] = found * found.sum(dim=0).sign().where(s[:2] > 0, 1.0)
        return places.numpy(), "principal components"
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return np.asarray(tsne.fit_transform(x.numpy())), "t-SNE"
