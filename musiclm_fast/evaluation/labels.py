"""Labels of sounds, and their texts."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import fail
from musiclm_fast._wording import plural


@dataclass(frozen=True)
class Labels:
    """A list of labels, their texts, and the labels of sounds.

    Args:
        prompts: for each label one or more texts, whose mean embedding represents it.
        of: for each sound's name its labels, possibly none.
    """

    prompts: dict[str, list[str]]
    of: dict[str, list[str]]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Labels:
        """Read a file of labels.

        A csv (or tsv) with a header has ``path`` and ``labels`` (or ``label``), several of them
        separated by ``;``, or one a row; a label's text is the label itself. A json has
        ``{"labels": {path: [label, ...]}, "prompts": {label: text or [text, ...]}}``; ``prompts``,
        if present, lists all labels.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: invalid table, or a sound has a label that is not in ``prompts``.
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
            fail("labels", plural(len(self.prompts), "label"), "at least two to choose from")
        for label, texts in self.prompts.items():
            if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                fail("labels", f"{texts!r} for {label!r}", "at least one text, none empty")
        for name, own in self.of.items():
            for label in own:
                if label not in self.prompts:
                    known = ", ".join([*self.prompts][:8])
                    fail("labels", f"{label!r} of {name!r}", f"one of the labels: {known}, ...")

    def table(self, names: Sequence[str], files: Sequence[str] = ()) -> Tensor:
        """The labels of each sound, ``(n, C)`` bool.

        Args:
            names: of the sounds.
            files: of the sounds; used if the name is not in the labels' file.

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
