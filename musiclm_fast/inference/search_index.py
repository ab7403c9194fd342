"""A music index: the embeddings of a folder's files, saved in a file.

The file is safetensors: ``latents (windows, d)``, ``starts (windows,)``, and the sounds' names as
JSON in its header. Only new and changed files are embedded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from musiclm_fast._checks import check_positive_int, check_shape, fail
from musiclm_fast._files import atomic_file, default_cache_folder
from musiclm_fast.datasets.captioned_sounds import CaptionedSounds
from musiclm_fast.datasets.listing import AUDIO_SUFFIXES, list_sounds, sound_files
from musiclm_fast.inference.embedder import Embedded, Embedder

FORMAT = 1


_SAVE_EVERY = 30.0  # seconds between saves: the most that a kill can lose


@dataclass(frozen=True)
class IndexedSound:
    """A file of the index: its size and modification time, which detect changes, and windows."""

    size: int
    mtime_ns: int
    embedded: Embedded


@dataclass(frozen=True)
class Changes:
    """The result of an update: numbers of new, changed, removed and unchanged files."""

    new: int
    changed: int
    removed: int
    kept: int

    def __str__(self) -> str:
        """In words, without zero counts."""
        counts = {"new": self.new, "changed": self.changed, "removed": self.removed}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


@dataclass(frozen=True)
class Match:
    """A result of a query.

    Args:
        name: its path relative to the folder.
        similarity: cosine of the query and the file's best window.
        start, end: that window, in seconds.
    """

    name: str
    similarity: float
    start: float
    end: float


class MusicIndex:
    """Embeddings of the windows of all sound files in a folder and below it.

    Args:
        folder: the music folder.
        embedder: the model and its windows.
        path: the file of the index; None is one in the user's cache folder, made for this folder
            and this model.

    Attributes:
        sounds: the indexed files by their paths relative to the folder.
        rebuilt: why an existing index at ``path`` is not used; else empty.
        unsaved: why the last update could not be written; else empty.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no sound files in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        embedder: Embedder,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder: no folder {os.fspath(folder)!r}")
        self.embedder = embedder
        self.model = embedder.fingerprint()
        if path is None:
            where = os.fsencode(self.folder.resolve())
            name = hashlib.blake2b(where, digest_size=12).hexdigest()
            path = default_cache_folder() / "index" / f"{name}-{self.model[:12]}.safetensors"
        self.path = Path(path)
        self.sounds: dict[str, IndexedSound] = {}
        self.rebuilt = ""
        self.unsaved = ""
        self.names = sound_files(self.folder)
        if not self.names:
            kinds = ", ".join(sorted(suffix[1:] for suffix in AUDIO_SUFFIXES))
            fail("folder", f"{os.fspath(folder)!r} without sound files", f"files of {kinds}")
        if self.path.exists():
            self._load()

    def failed(self) -> dict[str, str]:
        """Files that could not be embedded, with the reason."""
        return {name: s.embedded.reason for name, s in self.sounds.items() if s.embedded.reason}

    def windows(self) -> int:
        """Number of windows."""
        return sum(len(sound.embedded.starts) for sound in self.sounds.values())

    def update(self, progress: Callable[[int, int], Any] | None = None) -> Changes:
        """Embed new and changed files, drop removed ones, and write the index.

        An interrupted update saves the finished files; the next update continues from there.

        Args:
            progress: called with the number of files that are done and that there are to do.

        If the index cannot be written, ``unsaved`` has the reason.
        """
        stamps = {}
        for name in self.names:
            try:
                stat = os.stat(self.folder / name)
            except OSError:  # gone since it was listed, or a dangling link
                continue
            stamps[name] = (stat.st_size, stat.st_mtime_ns)
        gone = [name for name in self.sounds if name not in stamps]
        todo = []
        new = 0
        for name, stamp in stamps.items():
            known = self.sounds.get(name)
            if known is None or (known.size, known.mtime_ns) != stamp:
                todo.append(name)
                new += known is None
        changes = Changes(new, len(todo) - new, len(gone), len(stamps) - len(todo))
        for name in gone:
            del self.sounds[name]
        if not todo and not gone and self.path.exists():
            return changes
        listing = list_sounds(self.folder, todo)
        sounds = CaptionedSounds(listing, sample_hz=self.embedder.sample_hz, clip_seconds=None)
        saved = time.monotonic()
        try:
            for done, (place, embedded) in enumerate(self.embedder.sounds(sounds), 1):
                self.sounds[todo[place]] = IndexedSound(*stamps[todo[place]], embedded)
                if progress is not None:
                    progress(done, len(todo))
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save_or_say()
                    saved = time.monotonic()
        finally:
            self._save_or_say()
        return changes

    def _save_or_say(self) -> None:
        try:
            self.save()
            self.unsaved = ""
        except OSError as error:
            self.unsaved = str(error)

    def search(self, query: Tensor, count: int = 10) -> list[Match]:
        """The files whose best window is nearest to a query.

        Args:
            query: ``(d,)`` unit vector, such as a text's.
            count: how many files.

        Returns:
            At most ``count`` matches, best first, ties by name.
        """
        check_shape("query", query, (self.embedder.dim,), "(d,)")
        check_positive_int("count", count)
        matches = []
        vector = query.float().cpu().numpy()
        for name in sorted(self.sounds):
            embedded = self.sounds[name].embedded
            if not len(embedded.starts):
                continue
            near = embedded.latents @ vector  # (windows,)
            best = int(near.argmax())
            start = float(embedded.starts[best])
            end = min(start + self.embedder.window_seconds, embedded.seconds)
            matches.append(Match(name, float(near[best]), start, end))
        return sorted(matches, key=lambda match: -match.similarity)[:count]

    def save(self) -> None:
        """Write the index, atomically.

        Raises:
            OSError: it cannot be written; an earlier file is unchanged.
        """
        from safetensors.numpy import save

        latents = [np.zeros((0, self.embedder.dim), np.float32)]
        starts = [np.zeros(0)]
        rows = []
        for name, sound in self.sounds.items():
            own = sound.embedded
            latents.append(own.latents)
            starts.append(own.starts)
            stamp = [sound.size, sound.mtime_ns]
            # file names are bytes: invalid UTF-8 is kept as surrogates, which JSON escapes
            rows.append([name, *stamp, own.seconds, own.reason, len(own.starts)])
        header = {"format": FORMAT, "model": self.model, "sounds": rows}
        tensors: dict[str, np.ndarray] = {
            "latents": np.concatenate(latents),
            "starts": np.concatenate(starts),
        }
        with atomic_file(self.path) as file:
            file.write(save(tensors, metadata={"musiclm_fast": json.dumps(header)}))

    def _load(self) -> None:
        # Reads the index at path, or sets rebuilt to the reason why it cannot be used.
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})["musiclm_fast"])
                latents, starts = file.get_tensor("latents"), file.get_tensor("starts")
            if header["format"] != FORMAT:
                self.rebuilt = "it is of another version"
                return
            if header["model"] != self.model:
                self.rebuilt = "it was made by another model, or with other windows"
                return
            at = 0
            for name, size, mtime_ns, seconds, reason, count in header["sounds"]:
                part = slice(at, at := at + count)
                own = Embedded(starts[part], latents[part], seconds, reason)
                self.sounds[name] = IndexedSound(size, mtime_ns, own)
            if at != len(latents) or at != len(starts):
                raise ValueError("windows are missing")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise
            self.sounds = {}
            self.rebuilt = f"it is damaged ({error})"
