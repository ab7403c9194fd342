"""Evaluation of a MuLaN on captioned sounds: retrieval in both directions, labels, collapse.

The report is a deterministic function of model and files.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._checks import check_choice, fail
from musiclm_fast._files import write_json
from musiclm_fast.datasets.captioned_sounds import CaptionedSounds
from musiclm_fast.evaluation.labels import Labels
from musiclm_fast.evaluation.metrics import Spread, retrieval, roc_auc, spread
from musiclm_fast.evaluation.report import _KS, LabelScores, Report
from musiclm_fast.inference.embedder import Embedder


def evaluate(
    embedder: Embedder,
    sounds: CaptionedSounds,
    labels: Labels | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Report:
    """Evaluate a model on captioned sounds.

    A sound's embedding is the mean of its windows'. All captions of a sound are correct for it;
    equal captions are one candidate.

    Args:
        embedder: the model and its windows.
        sounds: opened with the embedder's ``sample_hz`` and ``clip_seconds=None``.
        labels: for zero-shot classification.
        progress: called with the number of finished sounds and of all sounds.

    Raises:
        ValueError: fewer than two sounds can be read, or the labels are not of these sounds.
    """
    every = [sounds.name(index) for index in range(len(sounds))]
    # a part of a file has its own labels or the file's
    files = [sounds.file(index) for index in range(len(sounds))]
    if labels is not None:
        labels.table(every, files)  # before work is lost
    names: list[str] = []
    latents: list[np.ndarray] = []
    left_out: dict[str, str] = {}
    kept: list[int] = []
    for done, (index, embedded) in enumerate(embedder.sounds(sounds), 1):
        if embedded.reason:
            left_out[every[index]] = embedded.reason
        else:
            kept.append(index)
            names.append(every[index])
            latents.append(embedded.mean())
        if progress is not None:
            progress(done, len(every))
    if len(names) < 2:
        why = "".join(f"; {name}: {reason}" for name, reason in [*left_out.items()][:3])
        fail("sounds", f"{len(names)} that can be read{why}", "at least two")
    place: dict[str, int] = {}
    pairs = []
    for row, index in enumerate(kept):
        for caption in dict.fromkeys(sounds.captions(index)):
            pairs.append((row, place.setdefault(caption, len(place))))
    texts = [*place]
    audio = torch.from_numpy(np.stack(latents))
    text = embedder.texts(texts)
    pair = torch.tensor(pairs)
    scores, table = None, None
    if labels is not None:
        table = labels.table(names, [files[index] for index in kept])
        scores = label_scores(audio, label_vectors(embedder, labels), table, [*labels.prompts])
    return Report(
        names=names,
        audio=audio,
        texts=texts,
        text=text,
        pairs=pair,
        audio_to_text=retrieval(audio, text, pair, _KS),
        text_to_audio=retrieval(text, audio, pair.flip(1), _KS),
        audio_spread=spread(audio),
        text_spread=spread(text) if len(text) > 1 else _of_one(text),
        labels=scores,
        left_out=left_out,
        label_names=() if labels is None else tuple(labels.prompts),
        label_table=table,
    )


def label_vectors(embedder: Embedder, labels: Labels) -> Tensor:
    """Unit vectors ``(C, d)``: the normalized mean of each label's texts'.

    Source: prompt ensembles, https://arxiv.org/abs/2103.00020.
    """
    flat = [text for texts in labels.prompts.values() for text in texts]
    parts = embedder.texts(flat).split([len(texts) for texts in labels.prompts.values()])
    return F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=-1)


def label_scores(
    audio: Tensor, vectors: Tensor, table: Tensor, names: Sequence[str]
) -> LabelScores:
    """Zero-shot classification of sounds with any number of labels.

    Args:
        audio: ``(n, d)`` unit vectors of the sounds.
        vectors: ``(C, d)`` unit vectors of the labels.
        table: ``(n, C)`` bool, the labels of each sound.
        names: C labels.

    Raises:
        ValueError: no sound has a label.
    """
    labelled = table.any(dim=1)
    if not labelled.any():
        fail("labels", "no sound with a label", "at least one")
    found = retrieval(audio[labelled], vectors, table[labelled].nonzero(), (1, 5))
    areas = roc_auc(audio @ vectors.t(), table)
    known = areas[~areas.isnan()]
    return LabelScores(
        found.recall,
        {name: None if math.isnan(a) else a for name, a in zip(names, areas.tolist(), strict=True)},
        known.mean().item() if len(known) else None,
        int(labelled.sum()),
    )


def _of_one(text: Tensor) -> Spread:
    return Spread(math.nan, 1.0, math.nan, text.shape[1], "one caption only: nothing to compare")


def write_report(
    report: Report, folder: str | os.PathLike[str], method: str = "auto"
) -> list[Path]:
    """Write ``report.json`` and, if matplotlib is installed, the figures.

    ``similarity.png`` shows at most 200 sounds and their captions, ``map.png`` at most 2,000
    sounds, evenly spaced in the list, ``ranks.png`` all.

    Args:
        report: the results.
        folder: the output folder, created if missing.
        method: of the map: ``"pca"``, ``"tsne"`` (which needs scikit-learn), or ``"auto"``,
            t-SNE if scikit-learn is installed.

    Returns:
        The files.

    Raises:
        ImportError: scikit-learn is not installed and ``"tsne"`` was asked for.
    """
    check_choice("method", method, ("auto", "pca", "tsne"))
    folder = Path(folder)
    write_json(folder / "report.json", report.to_dict())
    written = [folder / "report.json"]
    if importlib.util.find_spec("matplotlib") is None:
        return written
    from musiclm_fast.evaluation import figures

    return written + figures.write_all(report, folder, method)
