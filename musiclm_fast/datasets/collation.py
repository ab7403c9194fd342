"""Rows of a dataset as the keyword arguments of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from musiclm_fast._checks import describe, fail
from musiclm_fast.audio.batching import as_batch
from musiclm_fast.datasets.captioned_sounds import Row


def collate(rows: Sequence[Any]) -> dict[str, Any]:
    """Turn rows of a dataset into the keyword arguments of a MuLaN.

    Rows of :class:`CaptionedSounds` give ``wavs`` padded to the longest clip, ``lengths`` where
    the clips differ, ``raw_texts``, and ``skipped`` (a list, which the caller removes) if
    sounds could not be read.

    Other rows are as in upstream: a clip alone or a tuple with a clip and a text. Clips are
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
    batch: dict[str, Any] = {}
    for column in _columns(rows):
        value: Any
        if _are_texts(column):
            name, value = "raw_texts", list(column)
        elif _are_floating(column):
            shortest = min(len(t) for t in column)
            name, value = "wavs", torch.stack([t[:shortest] for t in column])
        elif all(isinstance(t, Tensor) and t.ndim == 1 for t in column):
            name, value = "texts", pad_sequence([t.long() for t in column], batch_first=True)
        else:
            _refuse(column, "clips (floating), texts (str) or token ids")
        if name in batch:
            fail("dataset", f"two elements per row that are {name}", "one clip and one text")
        batch[name] = value
    return batch


def collate_fields(rows: Sequence[Any], waves: Sequence[str]) -> dict[str, Any]:
    """Turn rows of a dataset into a wrapper's keyword arguments.

    A row is a clip or a tuple. Clips ``(samples,)`` get the names ``waves`` in order, padded with
    zeros to the longest; strings are ``text``; floating ``(c, dim)`` tensors ``text_embeds``.

    Raises:
        TypeError: an element is none of these, or there are too many.
    """
    names = iter(waves)
    batch: dict[str, Any] = {}
    for column in _columns(rows):
        name: str | None = None
        value: Any = None
        if _are_texts(column):
            name, value = "text", list(column)
        elif _are_floating(column) and column[0].ndim == 1:
            name, value = next(names, None), pad_sequence(list(column), batch_first=True)
        elif _are_floating(column) and column[0].ndim == 2:
            name, value = "text_embeds", torch.stack(list(column))
        if name is None or name in batch:
            _refuse(column, f"{', '.join(waves)} (samples,), a text, text_embeds")
        batch[name] = value
    return batch


def _columns(rows: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    # The first elements of all rows, the second ones, ...; a row may be an element alone.
    yield from zip(
        *(row if isinstance(row, (tuple, list)) else (row,) for row in rows), strict=True
    )


def _are_texts(column: Sequence[Any]) -> bool:
    return all(isinstance(item, str) for item in column)


def _are_floating(column: Sequence[Any]) -> bool:
    return all(isinstance(item, Tensor) and item.is_floating_point() for item in column)


def _refuse(column: Sequence[Any], allowed: str) -> NoReturn:
    kinds = " or ".join(sorted({describe(item) for item in column}))
    fail("dataset", kinds, allowed, TypeError)
