"""Problems of a collection of captioned sounds, found by reading all of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from musiclm_fast._optional import require
from musiclm_fast._wording import plural
from musiclm_fast.datasets.captioned_sounds import CaptionedSounds, Skipped
from musiclm_fast.datasets.decoding import CUT_SHORT, UnreadableSoundError, slack

SILENT = 1e-3  # peak, -60 dB of full scale


FULL_SCALE = 0.9995  # the largest magnitude but one of 12 bits


CLIPPED = 1e-3  # share of samples at full scale


_BLOCK = 1 << 18  # frames read at a time


@dataclass(frozen=True)
class _Sound:
    # The result of reading one sound; ``error`` if it could not be read.
    error: str | None = None
    seconds: float = 0.0
    rate: int = 0
    channels: int = 0
    peak: float = 0.0
    clipped: float = 0.0  # share of samples
    digest: bytes = b""


@dataclass
class DataReport:
    """The result of :func:`check_data`.

    Args:
        sounds: entries of the source.
        usable: that training can draw.
        files: distinct files among the sounds that are not left out.
        captions: of the same sounds.
        seconds: total length of the readable sounds.
        shortest, median, longest: lengths in seconds; 0 where nothing was read.
        rates: files' sample rates in Hz and how many sounds have them.
        channels: numbers of channels and how many sounds have them.
        failing: sounds that training would skip, with the reason.
        notes: sounds that training would use, with a possible problem.
    """

    sounds: int = 0
    usable: int = 0
    files: int = 0
    captions: int = 0
    seconds: float = 0.0
    shortest: float = 0.0
    median: float = 0.0
    longest: float = 0.0
    rates: dict[int, int] = field(default_factory=dict)
    channels: dict[int, int] = field(default_factory=dict)
    failing: list[Skipped] = field(default_factory=list)
    notes: list[Skipped] = field(default_factory=list)


class _Checks(Dataset[_Sound]):
    def __init__(self, sounds: CaptionedSounds) -> None:
        self.sounds = sounds

    def __len__(self) -> int:
        return len(self.sounds)

    def __getitem__(self, index: int) -> _Sound:
        try:
            return _read_all(self.sounds, index)
        except UnreadableSoundError as error:
            return _Sound(str(error))


def _read_all(sounds: CaptionedSounds, index: int) -> _Sound:
    soundfile = require("soundfile")

    digest = hashlib.blake2b(digest_size=16)
    peak, clipped, done = 0.0, 0, 0
    with sounds.open(index) as file:
        rate = file.samplerate
        first, end = sounds.part(index, file.frames, rate)
        digest.update(f"{rate} {file.channels}".encode())
        try:
            file.seek(first)
            while done < end - first:
                wanted = min(_BLOCK, end - first - done)
                block = file.read(wanted, dtype="float32", always_2d=True)  # (frames, channels)
                if not len(block):
                    break
                largest = float(np.abs(block).max())  # NaN where one is
                if not np.isfinite(largest):
                    raise UnreadableSoundError("holds NaN or infinity")
                peak = max(peak, largest)
                if largest >= FULL_SCALE:
                    clipped += int((np.abs(block) >= FULL_SCALE).sum())
                digest.update(block)
                done += len(block)
        except (soundfile.SoundFileError, OSError) as error:
            raise UnreadableSoundError(f"damaged or cut short: {error}") from error
        if end - first - done > slack(file.frames, rate) or not done:
            raise UnreadableSoundError(CUT_SHORT)
        return _Sound(
            seconds=done / rate,
            rate=rate,
            channels=file.channels,
            peak=peak,
            clipped=clipped / (done * file.channels),
            digest=digest.digest(),
        )


def check_data(
    sounds: CaptionedSounds, *, workers: int = 0, max_tokens: int = 256, progress: bool = False
) -> DataReport:
    """Read every sound and check every caption.

    Args:
        sounds: the collection, as :class:`CaptionedSounds` of the whole listing.
        workers: processes that read; 0 reads in this one.
        max_tokens: the text tower truncates longer captions.
        progress: show a bar on stderr.

    Returns:
        The report; every entry of it names a sound.
    """
    report = DataReport(sounds=len(sounds) + len(sounds.left_out), failing=[*sounds.left_out])
    loader: Any = DataLoader(
        _Checks(sounds),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    lengths = []
    rates: Counter[int] = Counter()
    channels: Counter[int] = Counter()
    first_of: dict[bytes, int] = {}  # digest: index
    bar = tqdm(loader, "reading", total=len(sounds), unit="sound", disable=not progress)
    for index, found in enumerate(bar):
        name = sounds.name(index)
        if found.error is not None:
            report.failing.append(Skipped(name, found.error))
            continue
        rates[found.rate] += 1
        channels[found.channels] += 1
        lengths.append(found.seconds)
        if found.seconds < sounds.min_seconds:
            reason = f"shorter than {sounds.min_seconds:g} s (min_seconds)"
            report.failing.append(Skipped(name, reason))
        if found.peak < SILENT:
            report.notes.append(Skipped(name, "silent: peak below -60 dB"))
        elif found.clipped > CLIPPED:
            report.notes.append(Skipped(name, "clipped: over 0.1% of the samples at full scale"))
        first = first_of.setdefault(found.digest, index)
        if first != index and found.peak >= SILENT:
            report.notes.append(Skipped(name, f"the same sound as {sounds.name(first)}"))
    report.usable = report.sounds - len(report.failing)
    report.files = len({sounds.file(index) for index in range(len(sounds))})
    report.seconds = sum(lengths)
    if lengths:
        report.shortest, report.longest = min(lengths), max(lengths)
        report.median = float(np.median(lengths))
    report.rates, report.channels = dict(rates.most_common()), dict(channels.most_common())
    _check_captions(sounds, max_tokens, report)
    return report


def _check_captions(sounds: CaptionedSounds, max_tokens: int, report: DataReport) -> None:
    from musiclm_fast.tokenizer import tokenizer

    seen: dict[str, int] = {}
    for index in range(len(sounds)):
        captions = sounds.captions(index)
        report.captions += len(captions)
        for caption in captions:
            # a token is one byte at least, so short captions need no tokenizer
            if (
                len(caption.encode(errors="surrogatepass")) > max_tokens
                and len(tokenizer.encode(caption)) > max_tokens
            ):
                name = sounds.name(index)
                report.notes.append(Skipped(name, f"caption cut to {plural(max_tokens, 'token')}"))
        first = seen.setdefault(captions[0].casefold(), index)
        if sounds.file(first) != sounds.file(index):
            reason = f"the same caption as {sounds.name(first)}"
            report.notes.append(Skipped(sounds.name(index), reason))
