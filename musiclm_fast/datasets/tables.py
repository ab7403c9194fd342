"""Captioned sounds listed in tables: manifests (csv, tsv, jsonl) and MusicCaps."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from musiclm_fast._checks import fail
from musiclm_fast._wording import plural
from musiclm_fast.datasets.listing import Entry, Listing, Skipped, captions_of, sound_files

SUFFIXES = (".csv", ".tsv", ".jsonl")


def is_table(path: str) -> bool:
    """Whether a file's name is a table's."""
    return Path(path).suffix.lower() in SUFFIXES


def find_manifest(folder: str) -> str | None:
    """The one table of a folder that has a manifest's columns; ``manifest.*`` has priority.

    A single table without them counts too, so that the error names its columns.
    """
    inside = sorted(os.listdir(folder))
    names = [name for name in inside if is_table(name)]
    only = len(names) == 1 and not any(name.endswith(".tar") for name in inside)
    named = [n for n in names if Path(n).stem == "manifest"]
    fitting = []
    for name in named or names:
        path = os.path.join(folder, name)
        columns = columns_of(path)
        if only or "ytid" in columns or {"path", "caption"} <= set(columns):
            fitting.append(path)
    if len(fitting) > 1:
        found = ", ".join(os.path.basename(path) for path in fitting)
        fail("source", f"{folder!r} with several manifests ({found})", "one of these files")
    return fitting[0] if fitting else None


def columns_of(path: str) -> list[str]:
    """The names of a table's columns: its header, or the keys of the first object."""
    if Path(path).suffix.lower() != ".jsonl":
        with _opened(path) as file:
            return _header(csv.reader(file, delimiter=_delimiter(path)))
    return next(([*row] for _, row in _rows(path) if "" not in row), [])


@contextmanager
def _opened(path: str) -> Iterator[io.TextIOWrapper]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise ValueError(f"source: {path!r} is not UTF-8 text: {error}") from error


def _delimiter(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def _header(reader: Iterator[list[str]]) -> list[str]:
    return [name.strip() for name in next(reader, [])]


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # (line, row) of a csv, tsv or jsonl file; a line that is no row gives {"": reason}
    with _opened(path) as file:
        if Path(path).suffix.lower() == ".jsonl":
            for line, text in enumerate(file, start=1):
                if text.strip():
                    try:
                        row = json.loads(text)
                    except ValueError as error:
                        row = {"": f"no JSON: {error}"}
                    yield line, row if isinstance(row, dict) else {"": "no JSON object"}
            return
        reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
        header = _header(reader)
        line = reader.line_num + 1  # of the next row: cells may contain line breaks
        try:
            for cells in reader:
                row = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    row[""] = f"{plural(len(cells), 'cell')} under {plural(len(header), 'column')}"
                if any(cells):
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"source: {path!r}, line {line}: {error}") from error


def _need_columns(path: str, needed: Sequence[str]) -> None:
    have = [name for name in columns_of(path) if name]
    lacking = [name for name in needed if name not in have]
    if lacking:
        fail(
            f"source {path!r}",
            f"columns {', '.join(have) or 'none'}",
            f"{', '.join(needed)} (lacking: {', '.join(lacking)})",
        )


def _seconds(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    number = float(value)
    if not math.isfinite(number) or number < 0 or isinstance(value, bool):
        raise ValueError
    return number


class _Exists:
    # Whether files exist: one listing per folder instead of one stat per file.
    def __init__(self) -> None:
        self.folders: dict[str, frozenset[str]] = {}

    def __call__(self, path: str) -> bool:
        parent, name = os.path.split(path)
        if parent not in self.folders:
            try:
                self.folders[parent] = frozenset(os.listdir(parent or "."))
            except OSError:
                self.folders[parent] = frozenset()
        # a file system that ignores case or normalises accents may list another spelling
        return name in self.folders[parent] or os.path.exists(path)


def list_manifest(table: str, audio: str | os.PathLike[str] | None) -> Listing:
    """The sounds of a table with columns path and caption."""
    _need_columns(table, ("path", "caption"))
    root = os.fspath(audio) if audio is not None else os.path.dirname(table)
    exists = _Exists()

    def entry(row: dict[str, Any], captions: list[str]) -> Entry | str:
        file = row["path"]
        path = os.path.join(root, file)
        if not exists(path):
            return "no such file"
        return Entry(file, path, captions, _seconds(row, "start"), _seconds(row, "end"))

    return _read_table(table, "path", entry)


def _read_table(
    table: str, key: str, entry: Callable[[dict[str, Any], list[str]], Entry | str]
) -> Listing:
    # One Entry per row of a table, or the error of the row.
    listing = Listing()
    for line, row in _rows(table):
        file = row.get(key)
        name = file.strip() if isinstance(file, str) else ""
        captions = captions_of(row.get("caption"))
        made: Entry | str
        if "" in row:
            made = row[""]
        elif not name:
            made = f"no {key}"
        elif captions is None:
            made = "caption is neither a string nor a list of strings"
        elif not captions:
            made = "empty caption"
        else:
            try:
                made = entry({**row, key: name}, captions)
            except (TypeError, ValueError):
                made = "start or end is no number of seconds"
        if isinstance(made, Entry) and made.end is not None and made.end <= (made.start or 0):
            made = "end is not after start"
        if isinstance(made, Entry):
            listing.entries.append(made)
        else:
            listing.left_out.append(Skipped(name or f"line {line}", made, line))
    return listing


# A ytid has 11 characters. Common tools save YTID.wav, YTID_30.wav, YTID_30_40.wav and
# [YTID]-[30-40].wav; the numbers are the part that was cut out.
_YTID_FILE = re.compile(r"\[?([\w-]{11})\]?([-_]\[?\d+(?:\.\d+)?(?:[-_]\d+(?:\.\d+)?)?\]?)?")


def list_musiccaps(table: str, audio: str | os.PathLike[str] | None) -> Listing:
    """The sounds of MusicCaps' table that are in a folder."""
    _need_columns(table, ("ytid", "start_s", "end_s", "caption"))
    root = os.fspath(audio) if audio is not None else os.path.dirname(table) or "."
    files: dict[str, tuple[str, bool]] = {}
    for name in sound_files(root):
        match = _YTID_FILE.fullmatch(Path(name).stem)
        if match:
            files.setdefault(match[1], (os.path.join(root, name), match[2] is not None))

    def entry(row: dict[str, Any], captions: list[str]) -> Entry | str:
        if row["ytid"] not in files:
            return f"no sound file of that ytid in {root!r}"
        path, is_cut = files[row["ytid"]]
        start, end = _seconds(row, "start_s"), _seconds(row, "end_s")
        if is_cut:
            start = end = None
        return Entry(row["ytid"], path, captions, start, end)

    listing = _read_table(table, "ytid", entry)
    listing.cut_files = True
    return listing
