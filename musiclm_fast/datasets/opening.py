"""A source of captioned sounds as a dataset."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence

from musiclm_fast._checks import fail
from musiclm_fast.datasets.captioned_sounds import CaptionedSounds
from musiclm_fast.datasets.decoding import need_soundfile
from musiclm_fast.datasets.listing import Skipped
from musiclm_fast.datasets.sources import list_source


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
        kind: ``manifest``, ``musiccaps``, ``folder``, ``webdataset``, or ``auto`` (detected).
        audio: the folder of the sounds, if it is not the manifest's.
        captions: of a folder without a manifest: ``names`` of the files, or ``tags`` in them.
        min_seconds: shorter sounds are skipped.
        extra_words: see :class:`CaptionedSounds`.
        cache_folder: where indices of shards are kept; None is the user's cache folder.

    Returns:
        The dataset. Rows that can never be drawn (missing file, empty caption) are in its
        ``left_out``, and a warning counts them.

    Raises:
        FileNotFoundError: there is nothing at ``source``.
        ValueError: an unknown kind, wrong columns, or no row that can be drawn.
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
    """Skipped sounds in one line: the count for each reason and some of the names."""
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
