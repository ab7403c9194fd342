"""Titles as captions of sound files."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path

from musiclm_fast._checks import check_choice, fail
from musiclm_fast._optional import require
from musiclm_fast.datasets.listing import Entry, Listing, Skipped, sound_files

CAPTIONS = ("names", "tags")


def title_of(name: str) -> str:
    """A file's name in words: ``music/03-northern_mountains.ogg`` is ``northern mountains``."""
    stem = Path(name).stem
    words = re.sub(r"[_\s.+-]+", " ", stem)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).strip()  # camelCase
    return re.sub(r"^\d+ (?=\D)", "", words) or words


def title_captions(path: str, name: str, source: str) -> list[str]:
    """The title of a sound file as its caption, from its name or its tags.

    Args:
        path: the file.
        name: the file name from which a title is made.
        source: ``names``, or ``tags``: the title tag, if present, and the genre.
    """
    title, genre = title_of(name), ""
    if source == "tags":
        soundfile = require("soundfile")

        try:
            with soundfile.SoundFile(path) as file:
                tags = file.copy_metadata()
        except (soundfile.SoundFileError, OSError):
            tags = {}  # reading the sound reports the error
        title, genre = tags.get("title", "").strip() or title, tags.get("genre", "").strip()
    captions = [title, f"{title}, {genre}"] if title and genre else [title or genre]
    return [caption for caption in captions if caption]


def list_folder(folder: str, captions: str) -> Listing:
    """List a folder's sound files, captioned by title; see :func:`title_captions`."""
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
        file: the output.
        folder: the sounds.
        captions: ``names`` or ``tags``, see :func:`title_captions`.
        relative_to: the folder that paths are relative to; None is ``folder``. Sounds outside
            it get absolute paths.

    Returns:
        The number of sounds.

    Raises:
        ValueError: the folder holds no sound files.
    """
    check_choice("captions", captions, CAPTIONS)
    root = os.path.abspath(folder)
    base = root if relative_to is None else os.path.abspath(relative_to)
    listing = list_folder(root, captions)
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
