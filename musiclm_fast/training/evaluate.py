"""Evaluation of a MuLaN on captioned sounds: retrieval both ways, labels, and whether it collapsed.

Nothing is drawn at random: the same model and files give the same report.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._checks import check_choice, fail
from musiclm_fast._files import atomic_file
from musiclm_fast.training.data import CaptionedSounds
from musiclm_fast.training.embedding import Embedder
from musiclm_fast.training.metrics import Retrieval, Spread, retrieval, roc_auc, spread

_KS = (1, 5, 10)


@dataclass(frozen=True)
class Labels:
    """A list of labels, texts that stand for each, and the labels of sounds.

    Args:
        prompts: label: one or more texts, whose mean stands for it.
        of: a sound's name: its labels; several, or none.
    """

    prompts: dict[str, list[str]]
    of: dict[str, list[str]]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Labels:
        """Read a file of labels.

        A csv (or tsv) with a header has ``path`` and ``labels`` (or ``label``), several of them
        separated by ``;``, or one a row; a label's text is the label itself. A json has
        ``{"labels": {path: [label, ...]}, "prompts": {label: text or [text, ...]}}``; the labels
        that are listed in ``prompts``, where it is there, are all there are.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such table, or a sound has a label that ``prompts`` lacks.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"labels: no file {str(path)!r}")
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix.lower() == ".json":
                return cls._from_json(json.loads(text), str(path))
        except ValueError as error:
            raise ValueError(f"labels: {str(path)!r}: {error}") from error
        return cls._from_table(text, path)

    @classmethod
    def _from_json(cls, content: Any, shown: str) -> Labels:
        if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
            raise ValueError("got no object with 'labels', expected {path: [label, ...]} there")
        of = {}
        for name, own in content["labels"].items():
            own = [own] if isinstance(own, str) else own
            if not isinstance(own, list) or not all(isinstance(label, str) for label in own):
                raise ValueError(f"labels of {name!r}: got {own!r}, expected a list of strings")
            of[name] = own
        prompts = content.get("prompts")
        if prompts is None:
            prompts = {label: label for label in sorted({v for own in of.values() for v in own})}
        if not isinstance(prompts, dict):
            raise ValueError(f"prompts: got {prompts!r}, expected {{label: text}}")
        texts = {k: [v] if isinstance(v, str) else list(v) for k, v in prompts.items()}
        return cls(texts, of)

    @classmethod
    def _from_table(cls, text: str, path: Path) -> Labels:
        rows = csv.DictReader(
            text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
        )
        columns = rows.fieldnames or []
        column = next((name for name in ("labels", "label") if name in columns), None)
        if column is None or "path" not in columns:
            found = ", ".join(columns) or "nothing"
            fail("labels", f"{str(path)!r} with the columns {found}", "path and labels")
        of: dict[str, list[str]] = {}
        for row in rows:
            labels = [label.strip() for label in (row[column] or "").split(";")]
            own = of.setdefault(row["path"], [])
            own.extend(label for label in labels if label and label not in own)
        names = sorted({label for own in of.values() for label in own})
        return cls({label: [label] for label in names}, of)

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            fail("labels", f"{len(self.prompts)} labels", "at least two to choose from")
        for label, texts in self.prompts.items():
            if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                fail("labels", f"{texts!r} for {label!r}", "at least one text, none empty")
        for name, own in self.of.items():
            for label in own:
                if label not in self.prompts:
                    known = ", ".join([*self.prompts][:8])
                    fail("labels", f"{label!r} of {name!r}", f"one of the labels: {known}, ...")

    def table(self, names: Sequence[str], files: Sequence[str] = ()) -> Tensor:
        """Which sounds have which labels, ``(n, C)`` bool.

        Args:
            names: of the sounds.
            files: of the sounds; looked up where the name is not in the labels' file.

        Raises:
            ValueError: none of the sounds is in the labels' file.
        """
        keys = [n if n in self.of else f for n, f in zip(names, files or names, strict=True)]
        if not any(key in self.of for key in keys):
            fail(
                "labels", f"names such as {[*self.of][:2]}",
                f"names of the sounds, such as {[*names][:2]}",
            )  # fmt: skip
        place = {label: column for column, label in enumerate(self.prompts)}
        table = torch.zeros(len(names), len(place), dtype=torch.bool)
        for row, key in enumerate(keys):
            for label in self.of.get(key, ()):
                table[row, place[label]] = True
        return table


@dataclass(frozen=True)
class LabelScores:
    """Zero-shot classification.

    Args:
        accuracy: for k of 1 and 5, the share of labelled sounds one of whose labels is among the k
            whose texts are nearest.
        roc_auc: of each label, the chance that a sound with it is nearer to its text than one
            without; None where all sounds have it, or none.
        macro_roc_auc: the mean of these; None where there is none.
        sounds: with at least one label; those without count in the ROC-AUC alone.
    """

    accuracy: dict[int, float]
    roc_auc: dict[str, float | None]
    macro_roc_auc: float | None
    sounds: int


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` found.

    Args:
        names: of the sounds, in the order of ``audio``.
        audio: ``(n, d)`` float32, a unit vector for each sound.
        texts: the different captions, in the order of ``text``.
        text: ``(m, d)`` float32, a unit vector for each caption.
        pairs: ``(p, 2)`` int64: a sound and a caption of it.
        audio_to_text, text_to_audio: retrieval; captions that several sounds share are right for
            all of them.
        labels: zero-shot classification, where labels were given.
        audio_spread, text_spread: whether either side has collapsed.
        left_out: sounds that could not be read, and why.
        label_names, label_table: the labels, and ``(n, C)`` bool, which sounds have which.
    """

    names: list[str]
    audio: Tensor
    texts: list[str]
    text: Tensor
    pairs: Tensor
    audio_to_text: Retrieval
    text_to_audio: Retrieval
    audio_spread: Spread
    text_spread: Spread
    labels: LabelScores | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    label_table: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the embeddings, as JSON has them (NaN is None)."""

        def way(found: Retrieval) -> dict[str, Any]:
            return {
                "queries": len(found.ranks),
                "candidates": found.candidates,
                **{f"recall@{k}": value for k, value in found.recall.items()},
                "median_rank": found.median_rank,
                "mAP@10": found.mean_average_precision,
            }

        report: dict[str, Any] = {
            "sounds": len(self.names),
            "captions": len(self.texts),
            "audio_to_text": way(self.audio_to_text),
            "text_to_audio": way(self.text_to_audio),
            "audio_embedding": asdict(self.audio_spread),
            "text_embedding": asdict(self.text_spread),
            "left_out": self.left_out,
        }
        if self.labels is not None:
            report["labels"] = {
                "sounds": self.labels.sounds,
                "labels": len(self.labels.roc_auc),
                **{f"top-{k}": value for k, value in self.labels.accuracy.items()},
                "macro_roc_auc": self.labels.macro_roc_auc,
                "roc_auc": self.labels.roc_auc,
            }
        plain: dict[str, Any] = _without_nan(report)
        return plain

    def table(self) -> str:
        """The figures for a terminal."""
        lines = [f"{len(self.names):,} sounds, {len(self.texts):,} captions", ""]
        heads = ["", *(f"recall@{k}" for k in _KS), "median rank", "mAP@10"]
        rows = [heads]
        for title, found in (
            ("audio -> text", self.audio_to_text),
            ("text -> audio", self.text_to_audio),
        ):
            recall = [f"{found.recall[k]:.1%}" for k in _KS]
            rank = f"{found.median_rank:g} of {found.candidates:,}"
            rows.append([title, *recall, rank, f"{found.mean_average_precision:.3f}"])
        lines += _aligned(rows)
        if self.labels is not None:
            own, chance = self.labels, 1 / len(self.labels.roc_auc)
            lines += ["", f"zero-shot over {len(own.roc_auc)} labels, {own.sounds:,} sounds"]
            shares = ", ".join(f"top-{k} {value:.1%}" for k, value in own.accuracy.items())
            auc = "undefined" if own.macro_roc_auc is None else f"{own.macro_roc_auc:.3f}"
            lines.append(f"  {shares} (chance {chance:.1%}); ROC-AUC {auc} (macro)")
            known = sorted((v, k) for k, v in own.roc_auc.items() if v is not None)
            if len(known) > 6:
                worst = ", ".join(f"{name} {value:.2f}" for value, name in known[:3])
                best = ", ".join(f"{name} {value:.2f}" for value, name in known[:-4:-1])
                lines.append(f"  best {best}; worst {worst}")
            elif known:
                lines.append("  " + ", ".join(f"{name} {value:.2f}" for value, name in known[::-1]))
        lines += [
            "",
            f"audio embedding: {self.audio_spread.verdict}",
            f"text embedding:  {self.text_spread.verdict}",
        ]
        if self.left_out:
            some = "; ".join(f"{name}: {why}" for name, why in [*self.left_out.items()][:3])
            lines.append(f"left out {len(self.left_out)} sounds: {some}")
        return "\n".join(lines)

    def write(self, folder: str | os.PathLike[str], method: str = "auto") -> list[Path]:
        """Write ``report.json`` and, where matplotlib is installed, the pictures.

        ``similarity.png`` is of at most 200 sounds and their captions, ``map.png`` of at most 2,000
        sounds, evenly spaced in the list, ``ranks.png`` of all.

        Args:
            folder: is made if need be.
            method: of the map: ``"pca"``, ``"tsne"`` (which needs scikit-learn), or ``"auto"``,
                t-SNE where scikit-learn is installed.

        Returns:
            The files.

        Raises:
            ImportError: scikit-learn is not installed and ``"tsne"`` was asked for.
        """
        check_choice("method", method, ("auto", "pca", "tsne"))
        folder = Path(folder)
        with atomic_file(folder / "report.json") as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())
        written = [folder / "report.json"]
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return written
        from musiclm_fast.training import evaluate_figures

        return written + evaluate_figures.write_all(self, folder, method)


def evaluate(
    embedder: Embedder,
    sounds: CaptionedSounds,
    labels: Labels | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Report:
    """Evaluate a model on captioned sounds.

    A sound is the mean of its windows' embeddings. All captions of a sound are right for it; those
    that are equal are one candidate.

    Args:
        embedder: the model and its windows.
        sounds: opened with the embedder's ``sample_hz`` and ``clip_seconds=None``.
        labels: for zero-shot classification.
        progress: called with the number of sounds that are done and that there are.

    Raises:
        ValueError: fewer than two sounds can be read, or the labels are not of these sounds.
    """
    every = [sounds.name(index) for index in range(len(sounds))]
    # a part of a file may have labels of its own, or the file's
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
    """Unit vectors ``(C, d)``: the mean of each label's texts', made 1 long again.

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
        table: ``(n, C)`` bool, which sounds have which labels.
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


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(own) for key, own in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
