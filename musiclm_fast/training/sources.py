"""Where captioned sounds come from: manifests, MusicCaps, folders and webdataset shards.

Each reader gives a :class:`Listing`: what can be drawn, and what cannot with the reason. Nothing
is decoded here.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from musiclm_fast._checks import check_choice, fail
from musiclm_fast._optional import require

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff"})
KINDS = ("auto", "manifest", "musiccaps", "folder", "webdataset")
CAPTIONS = ("names", "tags")
_TABLES = (".csv", ".tsv", ".jsonl")


class Skipped(NamedTuple):
    """A sound that was left out.

    Args:
        name: of the sound, as :meth:`CaptionedSounds.name` has it.
        reason: why, without the name; equal reasons are counted together.
        line: of the manifest, from 1, where the reason lies there.
    """

    name: str
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        where = "" if self.line is None else f" (line {self.line})"
        return f"{self.name}{where}: {self.reason}"


@dataclass(slots=True)
class Entry:
    """A sound and its captions.

    Args:
        file: the name by which the user knows the file: as written in the manifest, relative to
            the folder, the ytid of MusicCaps, or ``SHARD/KEY``.
        path: the file on disk; of a shard's member, the shard.
        captions: at least one, none of them blank.
        start, end: the part of the file in seconds; None for its start and its end.
        offset, size: a shard's member in bytes; a size of -1 is a file of its own.
    """

    file: str
    path: str
    captions: list[str]
    start: float | None = None
    end: float | None = None
    offset: int = 0
    size: int = -1


@dataclass
class Listing:
    """What a source holds.

    Args:
        entries: what can be drawn, in the source's order.
        left_out: what cannot.
        cut_files: files may hold no more than the part that start and end name: these apply only
            where the file is longer than that part.
    """

    entries: list[Entry] = field(default_factory=list)
    left_out: list[Skipped] = field(default_factory=list)
    cut_files: bool = False


def sound_files(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of all sound files in a folder and below it, relative to it, sorted.

    Files and folders whose name starts with a dot are left out.
    """
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(parent, folder)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:
                found.append(name if below == "." else os.path.join(below, name))
    return sorted(found)


def list_source(
    source: str | os.PathLike[str],
    kind: str = "auto",
    *,
    audio: str | os.PathLike[str] | None = None,
    captions: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
) -> Listing:
    """List a source; see :func:`musiclm_fast.training.data.open_dataset` for the arguments.

    Raises:
        FileNotFoundError: there is nothing at ``source``.
        ValueError: it is none of the kinds, or lacks a column.
    """
    check_choice("kind", kind, KINDS)
    if captions is not None:
        check_choice("captions", captions, CAPTIONS)
    text = os.fspath(source)
    if audio is not None and not os.path.isdir(audio):
        raise FileNotFoundError(f"audio: no folder {os.fspath(audio)!r}")
    if text.startswith(("pipe:", "http:", "https:", "s3:", "gs:", "hf:")):
        fail("source", repr(text), "a file or folder of this machine: download it first")
    if kind == "auto":
        kind = _guess_kind(text, captions)
    if kind == "webdataset":
        from musiclm_fast.training.shards import list_shards

        return list_shards(text, cache_folder)
    if not os.path.exists(text):
        raise FileNotFoundError(f"source: nothing at {text!r}")
    if kind == "folder":
        if not os.path.isdir(text):
            fail("source", f"{text!r}, no folder", "a folder for kind='folder'")
        return _list_folder(text, captions or "names")
    table = text
    if os.path.isdir(text):
        found = _manifest_in(text)
        if found is None:
            fail("source", f"{text!r}, which holds no manifest", f"a file for kind={kind!r}")
        table = found
    return _list_musiccaps(table, audio) if kind == "musiccaps" else _list_manifest(table, audio)


def _guess_kind(text: str, captions: str | None) -> str:
    if text.endswith(".tar") or (not os.path.exists(text) and set(text) & set("*?[{")):
        return "webdataset"
    if os.path.isfile(text):
        if Path(text).suffix.lower() not in _TABLES:
            fail("source", repr(text), "a folder, or a file .csv, .tsv, .jsonl or .tar")
        return "musiccaps" if "ytid" in _columns(text) else "manifest"
    if not os.path.isdir(text):
        raise FileNotFoundError(f"source: nothing at {text!r}")
    if captions is not None:
        return "folder"
    table = _manifest_in(text)
    if table is not None:
        return "musiccaps" if "ytid" in _columns(table) else "manifest"
    if any(name.endswith(".tar") for name in os.listdir(text)):
        return "webdataset"
    raise ValueError(
        f"source: got the folder {text!r} with {len(sound_files(text))} sound files, no manifest "
        "and no .tar, expected a manifest in it (csv or jsonl with path and caption; "
        "`musiclm-fast data titles` makes one of titles), or captions='names' or 'tags'"
    )


def _manifest_in(folder: str) -> str | None:
    # The one table of a folder that has a manifest's columns; manifest.* wins over others. A single
    # table without them is taken for one too, so that its columns are complained about.
    inside = sorted(os.listdir(folder))
    names = [name for name in inside if Path(name).suffix.lower() in _TABLES]
    only = len(names) == 1 and not any(name.endswith(".tar") for name in inside)
    named = [n for n in names if Path(n).stem == "manifest"]
    fitting = []
    for name in named or names:
        path = os.path.join(folder, name)
        columns = _columns(path)
        if only or "ytid" in columns or {"path", "caption"} <= set(columns):
            fitting.append(path)
    if len(fitting) > 1:
        found = ", ".join(os.path.basename(path) for path in fitting)
        fail("source", f"{folder!r} with several manifests ({found})", "one of these files")
    return fitting[0] if fitting else None


def _columns(path: str) -> list[str]:
    # The names of a table's columns: its header, or the keys of the first object.
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
        line = reader.line_num + 1  # on which the next row starts: cells may hold line breaks
        try:
            for cells in reader:
                row = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    row[""] = f"{len(cells)} cells under {len(header)} columns"
                if any(cells):
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"source: {path!r}, line {line}: {error}") from error


def _need_columns(path: str, needed: Sequence[str]) -> None:
    have = [name for name in _columns(path) if name]
    lacking = [name for name in needed if name not in have]
    if lacking:
        fail(
            f"source {path!r}",
            f"columns {', '.join(have) or 'none'}",
            f"{', '.join(needed)} (lacking: {', '.join(lacking)})",
        )


def captions_of(value: Any) -> list[str] | None:
    """Captions of a cell: a string, a list of strings or such a list in writing; else None."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            for parse in (json.loads, ast.literal_eval):
                try:
                    listed = parse(text)
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    continue
                if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
                    return [item.strip() for item in listed if item.strip()]
        return [text] if text else []
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [item.strip() for item in value if item.strip()]
    return None


def _seconds(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    number = float(value)
    if not math.isfinite(number) or number < 0 or isinstance(value, bool):
        raise ValueError
    return number


class _Exists:
    # Which files exist, by one listing per folder in place of one stat per file.
    def __init__(self) -> None:
        self.folders: dict[str, frozenset[str]] = {}

    def __call__(self, path: str) -> bool:
        parent, name = os.path.split(path)
        if parent not in self.folders:
            try:
                self.folders[parent] = frozenset(os.listdir(parent or "."))
            except OSError:
                self.folders[parent] = frozenset()
        # a file system that ignores case or normalises accents lists another spelling
        return name in self.folders[parent] or os.path.exists(path)


def _list_manifest(table: str, audio: str | os.PathLike[str] | None) -> Listing:
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
    # One Entry per row of a table, or what is wrong with the row.
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


def _list_musiccaps(table: str, audio: str | os.PathLike[str] | None) -> Listing:
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


def title_of(name: str) -> str:
    """A file's name in words: ``music/03-northern_mountains.ogg`` is ``northern mountains``."""
    stem = Path(name).stem
    words = re.sub(r"[_\s.+-]+", " ", stem)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).strip()  # camelCase
    return re.sub(r"^\d+ (?=\D)", "", words) or words


def title_captions(path: str, name: str, source: str) -> list[str]:
    """Captions of a sound file without any: its title, from its name or from its tags.

    Args:
        path: the file.
        name: the name that a title is made of.
        source: ``names``, or ``tags``: the title tag where there is one, and the genre.
    """
    title, genre = title_of(name), ""
    if source == "tags":
        soundfile = require("soundfile")

        try:
            with soundfile.SoundFile(path) as file:
                tags = file.copy_metadata()
        except (soundfile.SoundFileError, OSError):
            tags = {}  # reading the sound will say why
        title, genre = tags.get("title", "").strip() or title, tags.get("genre", "").strip()
    captions = [title, f"{title}, {genre}"] if title and genre else [title or genre]
    return [caption for caption in captions if caption]


def _list_folder(folder: str, captions: str) -> Listing:
    listing = Listing()
    for name in sound_files(folder):
        path = os.path.join(folder, name)
        texts = title_captions(path, name, captions)
        if texts:
            listing.entries.append(Entry(name, path, texts))
        else:
            listing.left_out.append(Skipped(name, "no title"))
    return listing


def write_manifest(
    file: io.TextIOBase,
    folder: str | os.PathLike[str],
    captions: str = "tags",
    relative_to: str | os.PathLike[str] | None = None,
) -> int:
    """Write a csv manifest of a folder's sound files, captioned by title.

    Args:
        file: where it goes.
        folder: the sounds.
        captions: ``names`` or ``tags``, see :func:`title_captions`.
        relative_to: the folder that paths are relative to; None is ``folder``. Sounds that do not
            lie in it get absolute paths.

    Returns:
        How many sounds it lists.

    Raises:
        ValueError: the folder holds no sound files.
    """
    check_choice("captions", captions, CAPTIONS)
    root = os.path.abspath(folder)
    base = root if relative_to is None else os.path.abspath(relative_to)
    listing = _list_folder(root, captions)
    if not listing.entries:
        fail("folder", f"{os.fspath(folder)!r} without sound files", "wav, flac, ogg, mp3 files")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "caption"])
    for entry in listing.entries:
        texts = entry.captions
        inside = os.path.commonpath([base, entry.path]) == base
        path = os.path.relpath(entry.path, base) if inside else entry.path
        cell = texts[0] if len(texts) == 1 else json.dumps(texts, ensure_ascii=False)
        writer.writerow([path, cell])
    return len(listing.entries)
