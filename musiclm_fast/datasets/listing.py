"""The entries of a source of captioned sounds, and the sounds that were left out."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff"})


class Skipped(NamedTuple):
    """A sound that was left out.

    Args:
        name: of the sound, as from :meth:`CaptionedSounds.name`.
        reason: why, without the name; equal reasons are counted together.
        line: of the manifest, from 1, if the reason is in the manifest.
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
        offset, size: a shard's member in bytes; size -1 means a separate file.
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
    """The contents of a source.

    Args:
        entries: sounds that can be drawn, in the source's order.
        left_out: sounds that cannot.
        cut_files: files may already be cut to the part from start to end; start and end apply
            only to a file that is longer than the part.
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


def captions_of(value: Any) -> list[str] | None:
    """Captions of a cell: a string, a list of strings or such a list as JSON; else None."""
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


def list_sounds(folder: str | os.PathLike[str], names: Sequence[str]) -> Listing:
    """Files of a folder, by their paths relative to it, as a dataset's listing."""
    paths = (os.path.join(os.fspath(folder), name) for name in names)
    return Listing([Entry(name, path, [name]) for name, path in zip(names, paths)])
