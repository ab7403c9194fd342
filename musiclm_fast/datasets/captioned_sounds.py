"""Captioned sounds for training and evaluation.

A draw is a function of its index and a seed only, so a resumed run draws the same clips as an
uninterrupted one. Unreadable sounds are replaced, counted and named.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast._checks import check_not_negative_int, check_positive, check_positive_int, fail
from musiclm_fast._optional import require
from musiclm_fast._wording import plural
from musiclm_fast.datasets.decoding import (
    CUT_SHORT,
    UnreadableSoundError,
    _Member,
    _message,
    _read_mono,
    slack,
)
from musiclm_fast.datasets.listing import Listing, Skipped
from musiclm_fast.datasets.random_words import with_extra_words

_TRIES = 1000  # replacement rows that a draw tries at most


class Row(tuple[Tensor, str]):
    """A clip and its caption, unpacks as ``wav, text``.

    Args:
        wav: ``(samples,)`` float32, mono.
        text: the caption.
        name: of the sound.
        position: index of the sound in its dataset.
        start: where the clip starts in its file, in seconds.
        skipped: sounds that this one replaces, since they could not be read.
    """

    name: str
    position: int
    start: float
    skipped: tuple[Skipped, ...]

    def __new__(
        cls,
        wav: Tensor,
        text: str,
        name: str,
        position: int,
        start: float = 0.0,
        skipped: Sequence[Skipped] = (),
    ) -> Row:
        """Make a row."""
        row = super().__new__(cls, (wav, text))
        row.name, row.position, row.start, row.skipped = name, position, start, tuple(skipped)
        return row

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The arguments with which pickle rebuilds the row."""
        return (*self, self.name, self.position, self.start, self.skipped)

    @property
    def wav(self) -> Tensor:
        """``(samples,)`` float32, mono."""
        return self[0]

    @property
    def text(self) -> str:
        """The caption."""
        return self[1]


class _Strings(Sequence[str]):
    # Many strings in one array: a list of objects is copied into every worker process as soon as
    # it is read, since reading counts references.
    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [s.encode("utf-8", "surrogatepass") for s in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        part = self.bytes[self.ends[index] : self.ends[index + 1]]
        return part.tobytes().decode("utf-8", "surrogatepass")


class CaptionedSounds(Dataset[Row]):
    """Sounds with one or more captions each, read from disk on each draw.

    Args:
        listing: the entries, made from a source by :func:`open_dataset`.
        sample_hz: of the clips, in Hz.
        clip_seconds: length of a clip; a longer sound is cropped, a shorter one stays short. None
            gives whole sounds.
        min_seconds: shorter sounds are skipped. The audio tower needs one patch: 0.16 s with
            patches of 16 frames at 10 ms.
        extra_words: maximum number of random words before and after a caption, see
            :func:`~musiclm_fast.datasets.random_words.with_extra_words`; 0 for none.

    Attributes:
        left_out: entries of the source that can never be drawn, such as missing files.
    """

    def __init__(
        self,
        listing: Listing,
        *,
        sample_hz: int,
        clip_seconds: float | None,
        min_seconds: float = 0.2,
        extra_words: int = 0,
    ) -> None:
        check_positive_int("sample_hz", sample_hz)
        if not min_seconds >= 0:
            fail("min_seconds", min_seconds, "a number of seconds from 0")
        check_not_negative_int("extra_words", extra_words)
        if clip_seconds is not None:
            check_positive("clip_seconds", clip_seconds)
            if clip_seconds < min_seconds:
                fail("clip_seconds", clip_seconds, f"at least min_seconds = {min_seconds}")
        self.sample_hz = sample_hz
        self.clip_seconds = clip_seconds
        self.min_seconds = min_seconds
        self.extra_words = extra_words
        self.cut_files = listing.cut_files
        self.left_out = tuple(listing.left_out)
        entries = listing.entries
        self._files = _Strings([e.file for e in entries])
        self._paths = _Strings([e.path for e in entries])
        self._captions = _Strings([caption for e in entries for caption in e.captions])
        self._first_caption = np.cumsum([0, *(len(e.captions) for e in entries)])
        spans = [(e.start or 0.0, math.inf if e.end is None else e.end) for e in entries]
        self._spans = np.array(spans, dtype=np.float64).reshape(-1, 2)  # start, end in seconds
        self._bytes = np.array([(e.offset, e.size) for e in entries], dtype=np.int64).reshape(-1, 2)
        self._rows = np.arange(len(entries))  # this dataset's rows of the tables above

    def __len__(self) -> int:
        """Number of sounds."""
        return len(self._rows)

    def _row(self, index: int) -> int:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index: got {index}, expected one of {plural(size, 'sound')}")
        return int(self._rows[index])

    def captions(self, index: int) -> list[str]:
        """All captions of a sound, at least one."""
        row = self._row(index)
        first, end = self._first_caption[row : row + 2].tolist()
        return [self._captions[caption] for caption in range(first, end)]

    def file(self, index: int) -> str:
        """The file's name in the source; parts of one file share it."""
        return str(self._files[self._row(index)])

    def name(self, index: int) -> str:
        """The file's name, with the seconds of the part if it is a part."""
        start, end = self._spans[self._row(index)].tolist()
        if start == 0 and end == math.inf:
            return self.file(index)
        return f"{self.file(index)} [{start:g}-{'' if end == math.inf else f'{end:g}'} s]"

    def select(self, indices: Sequence[int] | np.ndarray) -> CaptionedSounds:
        """A dataset of some of the sounds, which shares this one's tables."""
        part = copy.copy(self)
        part._rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return part

    def draw(self, index: int, seed: int) -> Row:
        """A random clip of a sound with one of its captions.

        The result is a function of ``index`` and ``seed`` (and of the files). A sound that cannot
        be read is replaced by another one, drawn from the seed, and named in ``row.skipped``.

        Raises:
            RuntimeError: none of 1,000 sounds, or of all, can be read.
        """
        self._row(index)  # raises if there is no such sound
        index %= len(self)
        generator = np.random.default_rng([index, seed % 2**64])
        where, which = generator.random(2).tolist()
        skipped: list[Skipped] = []
        for candidate in self._candidates(index, generator):
            try:
                wav, start = self._read(candidate, where)
            except UnreadableSoundError as error:
                skipped.append(Skipped(self.name(candidate), str(error)))
                continue
            captions = self.captions(candidate)
            text = captions[int(which * len(captions))]
            text = with_extra_words(text, self.extra_words, lambda n: int(generator.integers(n)))
            return Row(wav, text, self.name(candidate), candidate, start, skipped)
        raise RuntimeError(
            f"dataset: none of {plural(len(skipped), 'sound')} can be read, "
            f"the first is {skipped[0]}"
        )

    def _candidates(self, index: int, generator: np.random.Generator) -> Iterator[int]:
        yield index
        tried = {index}
        for _ in range(min(len(self) - 1, _TRIES)):
            while (other := int(generator.integers(len(self)))) in tried:
                pass
            tried.add(other)
            yield other

    def whole(self, index: int) -> Row:
        """A sound for evaluation: its middle ``clip_seconds`` and first caption; deterministic.

        Raises:
            UnreadableSoundError: it cannot be read; the message has its name and the reason.
        """
        try:
            wav, start = self._read(index, 0.5)
        except UnreadableSoundError as error:
            raise UnreadableSoundError(f"{self.name(index)}: {error}") from error
        return Row(wav, self.captions(index)[0], self.name(index), index, start)

    def __getitem__(self, index: int | tuple[int, int]) -> Row:
        """The draw of ``(index, seed)``, or of an index with a seed from torch's generator.

        With an index alone, unreadable sounds raise a warning, since not every loader reads
        ``row.skipped``.
        """
        if isinstance(index, tuple):
            return self.draw(*index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, expected one of {plural(len(self), 'sound')}")
        row = self.draw(index, int(torch.randint(2**62, ())))
        if row.skipped:
            names = "; ".join(map(str, row.skipped))
            warnings.warn(f"dataset: skipped {names}", stacklevel=2)
        return row

    @contextmanager
    def open(self, index: int) -> Iterator[Any]:
        """The sound's file as a ``soundfile.SoundFile``, open for a ``with`` block.

        Raises:
            UnreadableSoundError: it cannot be opened.
        """
        soundfile = require("soundfile")

        row = self._row(index)
        path = self._paths[row]
        offset, size = self._bytes[row].tolist()
        with ExitStack() as stack:
            try:
                source: Any = os.fsencode(path)  # a name may be any bytes
                if size >= 0:
                    source = stack.enter_context(_Member(path, offset, size))
                file = stack.enter_context(soundfile.SoundFile(source))
            except (soundfile.SoundFileError, OSError) as error:
                if not os.path.exists(path):
                    raise UnreadableSoundError("no such file") from error
                raise UnreadableSoundError(f"cannot be read as sound: {_message(error)}") from error
            yield file

    def part(self, index: int, frames: int, rate: int) -> tuple[int, int]:
        """First frame and end of the part of a file with that many frames at ``rate`` Hz.

        Raises:
            UnreadableSoundError: the part lies outside the file.
        """
        start, end = self._spans[self._row(index)].tolist()
        if self.cut_files and frames <= (end - start + 1) * rate:
            return 0, frames
        first = round(start * rate)
        last = frames if end == math.inf else min(frames, round(end * rate))
        if first >= last:
            what = "holds no samples" if start == 0 else "the file ends before the part starts"
            raise UnreadableSoundError(what)
        return first, last

    def seconds(self, index: int) -> float:
        """Length of a sound in seconds, from its file's header.

        Raises:
            UnreadableSoundError: it cannot be opened, or is shorter than ``min_seconds``.
        """
        with self.open(index) as file:
            first, end = self.part(index, file.frames, file.samplerate)
            seconds: float = (end - first) / file.samplerate
        if seconds < self.min_seconds:
            raise UnreadableSoundError(f"shorter than {self.min_seconds:g} s (min_seconds)")
        return seconds

    def window(self, index: int, start: float, seconds: float) -> Tensor:
        """At most ``seconds`` of a sound from ``start``, counted from the sound's start.

        Returns:
            ``(samples,)`` float32 at ``sample_hz``, mono.

        Raises:
            UnreadableSoundError: it cannot be read, or ends before ``start``.
        """
        with self.open(index) as file:
            rate = file.samplerate
            first, end = self.part(index, file.frames, rate)
            first += round(start * rate)
            samples = round(seconds * self.sample_hz)
            frames = min(end - first, math.ceil(samples * rate / self.sample_hz))
            if frames <= 0:
                raise UnreadableSoundError(f"ends before {start:g} s")
            wav, missing = _read_mono(file, first, frames, self.sample_hz)
            if missing > slack(file.frames, rate):
                raise UnreadableSoundError(CUT_SHORT)
            return torch.from_numpy(wav[:samples])

    def _read(self, index: int, where: float) -> tuple[Tensor, float]:
        # A clip of the sound and its start in seconds; where in [0, 1) selects the clip.
        with self.open(index) as file:
            rate = file.samplerate
            first, end = self.part(index, file.frames, rate)
            frames = end - first
            if frames < self.min_seconds * rate:
                raise UnreadableSoundError(f"shorter than {self.min_seconds:g} s (min_seconds)")
            samples: int | None = None
            if self.clip_seconds is not None:
                samples = round(self.clip_seconds * self.sample_hz)
                wanted = math.ceil(samples * rate / self.sample_hz)
                frames = min(frames, wanted)
            begin = first + int(where * (end - first - frames + 1))
            wav, missing = _read_mono(file, begin, frames, self.sample_hz)
            most = slack(file.frames, rate)
            if 0 < missing <= most and begin > first:
                # an earlier clip: near such an end decoders do not find a frame exactly
                begin = max(first, end - most - frames)
                wav, missing = _read_mono(file, begin, frames, self.sample_hz)
            if missing > most or len(wav) < self.min_seconds * self.sample_hz - 1:
                raise UnreadableSoundError(CUT_SHORT)
        return torch.from_numpy(wav[:samples]), begin / rate
