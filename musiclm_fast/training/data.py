"""Captioned sounds for training and evaluation: opened, drawn, split and put into batches.

A draw is a function of its index and a seed, nothing else, so that a resumed run draws what the
one that was stopped would have drawn. What cannot be read is replaced, counted and named.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from musiclm_fast._checks import (
    check_not_negative_int,
    check_positive,
    check_positive_int,
    check_probability,
    describe,
    fail,
)
from musiclm_fast._optional import require
from musiclm_fast.models.sound import as_batch
from musiclm_fast.training.captions import with_extra_words
from musiclm_fast.training.sources import Listing, Skipped, list_source

__all__ = ["CaptionedSounds", "Row", "Skipped", "collate", "open_dataset", "split"]

_TRIES = 1000  # other rows that a draw tries before it gives up
_CONTEXT = 1024  # frames around a clip that the resampler's filter sees
# Headers of sound files overstate the length a little (an ogg of a Debian package: 0.13 s of 207).
_SLACK_SECONDS, _SLACK_SHARE = 0.5, 0.05


class UnreadableSoundError(ValueError):
    """A sound that cannot be read; the message is the reason."""


class Row(tuple[Tensor, str]):
    """A clip and its caption, which unpacks as ``wav, text``.

    Args:
        wav: ``(samples,)`` float32, mono.
        text: the caption.
        name: of the sound.
        position: index of the sound in its dataset.
        start: where the clip starts in its file, in seconds.
        skipped: sounds that were to be drawn first and could not be read.
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
        """What pickle makes the row of."""
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
    """Sounds with one or more captions each, read from disk when they are drawn.

    Args:
        listing: what there is, see :func:`open_dataset`, which makes it from a source.
        sample_hz: of the clips, in Hz.
        clip_seconds: length of a clip; a longer sound is cropped, a shorter one stays short. None
            is whole sounds.
        min_seconds: shorter sounds are skipped. The audio tower needs one patch: 0.16 s with
            patches of 16 frames at 10 ms.
        extra_words: most random words before the caption of a draw and after it, see
            :func:`~musiclm_fast.training.captions.with_extra_words`; 0 for none.

    Attributes:
        left_out: sounds of the source that cannot be drawn at all, such as missing files.
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
        self._rows = np.arange(len(entries))  # rows of the tables above that are this dataset's

    def __len__(self) -> int:
        """How many sounds there are."""
        return len(self._rows)

    def _row(self, index: int) -> int:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index: got {index}, expected one of {size} sounds")
        return int(self._rows[index])

    def captions(self, index: int) -> list[str]:
        """All captions of a sound, at least one."""
        row = self._row(index)
        first, end = self._first_caption[row : row + 2].tolist()
        return [self._captions[caption] for caption in range(first, end)]

    def file(self, index: int) -> str:
        """The file's name as the source has it; several parts of one file share it."""
        return str(self._files[self._row(index)])

    def name(self, index: int) -> str:
        """The file's name, with the part in seconds where a part was asked for."""
        start, end = self._spans[self._row(index)].tolist()
        if start == 0 and end == math.inf:
            return self.file(index)
        return f"{self.file(index)} [{start:g}-{'' if end == math.inf else f'{end:g}'} s]"

    def select(self, indices: Sequence[int] | np.ndarray) -> CaptionedSounds:
        """The dataset of some of the sounds; it shares the tables of this one."""
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
        self._row(index)  # is there
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
            f"dataset: none of {len(skipped)} sounds can be read, the first is {skipped[0]}"
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
        """A sound for evaluation: its middle ``clip_seconds`` and its first caption, no chance.

        Raises:
            UnreadableSoundError: it cannot be read; the message names it and says why.
        """
        try:
            wav, start = self._read(index, 0.5)
        except UnreadableSoundError as error:
            raise UnreadableSoundError(f"{self.name(index)}: {error}") from error
        return Row(wav, self.captions(index)[0], self.name(index), index, start)

    def __getitem__(self, index: int | tuple[int, int]) -> Row:
        """A draw: of ``(index, seed)``, or of an index with a seed from torch's generator.

        A sound that an index alone cannot read is warned about, since not every loader looks at
        ``row.skipped``.
        """
        if isinstance(index, tuple):
            return self.draw(*index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, expected one of {len(self)} sounds")
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
            UnreadableSoundError: the file holds nothing of the part.
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
        """Length of a sound, as its file's header has it.

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
        """What a sound holds of ``seconds`` from ``start`` (from where the sound starts) on.

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
        # A clip of the sound and its start in seconds; where in [0, 1) says which clip.
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


class _Member(io.RawIOBase):
    # A member of a tar as a file of its own, opened anew by each reader.
    def __init__(self, path: str, offset: int, size: int) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - closed with this object
        self.offset, self.size, self.position = offset, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self.size - self.position))
        self.file.seek(self.offset + self.position)
        read = self.file.readinto(memoryview(buffer)[:wanted])
        self.position += read
        return read

    def close(self) -> None:
        self.file.close()
        super().close()


def _message(error: Exception) -> str:
    # What an error says, without the file's name, so that equal reasons can be counted.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")


CUT_SHORT = "cut short: holds fewer frames than its header says"


def slack(frames: int, rate: int) -> int:
    """Frames that may be missing at the end of a file of ``frames`` by its header."""
    return int(min(_SLACK_SECONDS * rate, _SLACK_SHARE * frames))


def _read_mono(file: Any, first: int, frames: int, sample_hz: int) -> tuple[np.ndarray, int]:
    # Frames of an open file as mono at sample_hz, (samples,) float32, and how many are missing at
    # the file's end. What lies around them is read too, for the resampler's filter, as a multiple
    # of the least common period of both rates: sample 0 is then exactly at frame ``first``.
    soundfile = require("soundfile")

    rate = file.samplerate
    before = 0
    after = 0
    if rate != sample_hz:
        period = rate // math.gcd(rate, sample_hz)  # frames
        before = min(math.ceil(_CONTEXT / period), first // period) * period
        after = min(_CONTEXT, file.frames - first - frames)
    try:
        file.seek(first - before)
        sound = file.read(before + frames + after, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise UnreadableSoundError(f"damaged or cut short: {_message(error)}") from error
    missing = max(0, before + frames - len(sound))
    if not len(sound):
        return np.zeros(0, np.float32), missing
    # numpy's mean over an axis of 2 takes a third as long as decoding
    mono = sound[:, 0].copy()  # (frames,)
    for channel in range(1, sound.shape[1]):
        mono += sound[:, channel]
    mono /= sound.shape[1]
    if not np.isfinite(mono).all():
        raise UnreadableSoundError("holds NaN or infinity")
    if rate != sample_hz:
        soxr = require("soxr")

        mono = soxr.resample(mono, rate, sample_hz, quality="VHQ")
        skip = before * sample_hz // rate
        mono = mono[skip : skip + round(max(0, frames - missing) * sample_hz / rate)]
    return np.ascontiguousarray(mono), missing


def need_soundfile() -> None:
    """Raise ImportError, with what to install, where sounds cannot be read."""
    require("soundfile")
    require("soxr")


def open_dataset(
    source: str | os.PathLike[str],
    *,
    sample_hz: int,
    clip_seconds: float | None,
    kind: str = "auto",
    audio: str | os.PathLike[str] | None = None,
    captions: str | None = None,
    min_seconds: float = 0.2,
    extra_words: int = 0,
    cache_folder: str | os.PathLike[str] | None = None,
) -> CaptionedSounds:
    """Open a collection of captioned sounds (wav, flac, mp3, ogg, opus, aiff).

    Args:
        source: one of

            - a manifest: csv, tsv (with a header) or jsonl with ``path`` (relative to the
              manifest), ``caption`` (a string or a list of strings) and, if wanted, ``start`` and
              ``end`` in seconds;
            - MusicCaps' csv (``ytid``, ``start_s``, ``end_s``, ``caption``) with sound files named
              by ytid: ``YTID.wav``, ``YTID_30_40.wav`` or ``[YTID]-[30-40].wav``;
            - a folder with one such table in it; or, with ``captions``, a folder of sounds;
            - webdataset shards, not compressed: a .tar, a folder of them, a pattern such as
              ``music-{000..012}.tar`` or ``music-*.tar``.
        sample_hz: rate of the clips, in Hz.
        clip_seconds: length of a clip, or None for whole sounds.
        kind: ``manifest``, ``musiccaps``, ``folder``, ``webdataset``, or ``auto``, which looks.
        audio: the folder of the sounds, where it is not the manifest's.
        captions: of a folder without a manifest: ``names`` of the files, or ``tags`` in them.
        min_seconds: shorter sounds are skipped.
        extra_words: see :class:`CaptionedSounds`.
        cache_folder: where indices of shards are kept; None is the user's cache folder.

    Returns:
        The dataset. Rows that can never be drawn, since the file is missing or the caption empty,
        are not in it: they are its ``left_out``, and a warning counts them.

    Raises:
        FileNotFoundError: there is nothing at ``source``.
        ValueError: an unknown kind, wrong columns, or not one row that can be drawn.
        ImportError: soundfile or soxr is not installed.
    """
    need_soundfile()
    listing = list_source(source, kind, audio=audio, captions=captions, cache_folder=cache_folder)
    shown = repr(os.fspath(source))
    if not listing.entries:
        why = f": {summary(listing.left_out)}" if listing.left_out else ""
        fail("source", f"{shown} with nothing to draw{why}", "captioned sounds")
    if listing.left_out:
        warnings.warn(
            f"source: {shown}: left out {summary(listing.left_out)}. "
            "`musiclm-fast data check` lists them all",
            stacklevel=2,
        )
    return CaptionedSounds(
        listing, sample_hz=sample_hz, clip_seconds=clip_seconds, min_seconds=min_seconds,
        extra_words=extra_words,
    )  # fmt: skip


def summary(skipped: Sequence[Skipped], names: int = 3) -> str:
    """Skipped sounds in one line: how many for each reason, and some of their names."""
    reasons = Counter(skip.reason for skip in skipped)
    parts = []
    for reason, count in reasons.most_common(names):
        of_it = [skip for skip in skipped if skip.reason == reason]
        some = ", ".join(
            skip.name + ("" if skip.line is None else f" (line {skip.line})")
            for skip in of_it[:names]
        )
        parts.append(f"{count:,} x {reason} ({some}{', ...' if count > names else ''})")
    if len(reasons) > names:
        others = sum(reasons.values()) - sum(count for _, count in reasons.most_common(names))
        parts.append(f"{others:,} for other reasons")
    return "; ".join(parts)


def split(
    dataset: CaptionedSounds, valid_frac: float, seed: int = 0
) -> tuple[CaptionedSounds, CaptionedSounds]:
    """Split into a part for training and one for validation.

    A file's part is a function of its name and the seed, so that adding files moves none, and all
    parts of one file stay together. Either may be empty where there are few files.

    Args:
        dataset: to be split.
        valid_frac: share of the files for validation, in [0, 1); met on average.
        seed: another one splits otherwise.

    Returns:
        ``(train, valid)``.
    """
    check_probability("valid_frac", valid_frac)
    key = str(seed).encode()
    bound = int(valid_frac * 2**64)
    is_valid = np.zeros(len(dataset), dtype=bool)
    for index in range(len(dataset)):
        name = dataset.file(index).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(name, digest_size=8, key=key).digest()
        is_valid[index] = int.from_bytes(digest, "big") < bound
    return dataset.select(np.flatnonzero(~is_valid)), dataset.select(np.flatnonzero(is_valid))


def collate(rows: Sequence[Any]) -> dict[str, Any]:
    """Turn rows of a dataset into the keyword arguments of a MuLaN.

    Rows of :class:`CaptionedSounds` give ``wavs`` padded to the longest clip, ``lengths`` where
    the clips differ, ``raw_texts``, and ``skipped`` (a list, for the caller to take out) where
    sounds could not be read.

    Other rows are the reference's: a clip alone or a tuple with a clip and a text. Clips are
    floating tensors ``(samples,)`` or spectrograms ``(time, frequency)`` and are cut to the
    shortest of the batch; texts are strings or integer tensors ``(n,)``, padded with 0 to the
    longest.

    Raises:
        TypeError: an element is none of these.
        ValueError: two elements of a row are of the same kind.
    """
    if rows and all(isinstance(row, Row) for row in rows):
        wavs, lengths = as_batch([row.wav for row in rows])
        sounds: dict[str, Any] = {"wavs": wavs, "raw_texts": [row.text for row in rows]}
        if lengths is not None:
            sounds["lengths"] = lengths
        if any(row.skipped for row in rows):
            sounds["skipped"] = [skip for row in rows for skip in row.skipped]
        return sounds
    rows = [row if isinstance(row, (tuple, list)) else (row,) for row in rows]
    batch: dict[str, Any] = {}
    for column in zip(*rows, strict=True):
        value: Any
        if all(isinstance(item, str) for item in column):
            name, value = "raw_texts", list(column)
        elif all(isinstance(t, Tensor) and t.is_floating_point() for t in column):
            shortest = min(len(t) for t in column)
            name, value = "wavs", torch.stack([t[:shortest] for t in column])
        elif all(isinstance(t, Tensor) and t.ndim == 1 for t in column):
            name, value = "texts", pad_sequence([t.long() for t in column], batch_first=True)
        else:
            kinds = " or ".join(sorted({describe(item) for item in column}))
            fail("dataset", kinds, "clips (floating), texts (str) or token ids", TypeError)
        if name in batch:
            fail("dataset", f"two elements per row that are {name}", "one clip and one text")
        batch[name] = value
    return batch
