"""The results of an evaluation, as a table and as plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from musiclm_fast._tables import aligned
from musiclm_fast._wording import plural
from musiclm_fast.evaluation.metrics import Retrieval, Spread

_KS = (1, 5, 10)


@dataclass(frozen=True)
class LabelScores:
    """Zero-shot classification.

    Args:
        accuracy: for k of 1 and 5, the share of labelled sounds with one of their labels among
            the k whose texts are nearest.
        roc_auc: of each label, the probability that a sound with it is nearer to its text than one
            without; None if all sounds have it, or none.
        macro_roc_auc: the mean of these; None if there is none.
        sounds: number with at least one label; the others count in the ROC-AUC only.
    """

    accuracy: dict[int, float]
    roc_auc: dict[str, float | None]
    macro_roc_auc: float | None
    sounds: int


@dataclass(frozen=True)
class Report:
    """The results of :func:`evaluate`.

    Args:
        names: of the sounds, in the order of ``audio``.
        audio: ``(n, d)`` float32, a unit vector for each sound.
        texts: the different captions, in the order of ``text``.
        text: ``(m, d)`` float32, a unit vector for each caption.
        pairs: ``(p, 2)`` int64: a sound and a caption of it.
        audio_to_text, text_to_audio: retrieval; a caption that several sounds share is correct
            for all of them.
        labels: zero-shot classification, if labels were given.
        audio_spread, text_spread: whether either side has collapsed.
        left_out: sounds that could not be read, with the reason.
        label_names, label_table: the labels, and ``(n, C)`` bool, the labels of each sound.
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
        lines = [f"{plural(len(self.names), 'sound')}, {plural(len(self.texts), 'caption')}", ""]
        heads = ["", *(f"recall@{k}" for k in _KS), "median rank", "mAP@10"]
        rows = [heads]
        for title, found in (
            ("audio -> text", self.audio_to_text),
            ("text -> audio", self.text_to_audio),
        ):
            recall = [f"{found.recall[k]:.1%}" for k in _KS]
            rank = f"{found.median_rank:g} of {found.candidates:,}"
            rows.append([title, *recall, rank, f"{found.mean_average_precision:.3f}"])
        lines.append(aligned(rows))
        if self.labels is not None:
            own, chance = self.labels, 1 / len(self.labels.roc_auc)
            over = f"{plural(len(own.roc_auc), 'label')}, {plural(own.sounds, 'sound')}"
            lines += ["", f"zero-shot over {over}"]
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
            lines.append(f"left out {plural(len(self.left_out), 'sound')}: {some}")
        return "\n".join(lines)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(own) for key, own in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
