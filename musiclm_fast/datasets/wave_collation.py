"""Rows of clips as the keyword arguments of a stage's wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from musiclm_fast._checks import describe, fail


def collate_fields(rows: Sequence[Any], waves: Sequence[str]) -> dict[str, Any]:
    """Turn rows of a data set into a wrapper's keyword arguments.

    A row is a clip or a tuple. Clips ``(samples,)`` go by the names ``waves`` in turn, padded with
    zeros to the longest; strings are ``text``; floating ``(c, dim)`` tensors ``text_embeds``.

    Raises:
        TypeError: an element is none of these, or there is one too many.
    """
    rows = [row if isinstance(row, (tuple, list)) else (row,) for row in rows]
    names = iter(waves)
    batch: dict[str, Any] = {}
    for column in zip(*rows, strict=True):
        name: str | None = None
        value: Any = None
        if all(isinstance(item, str) for item in column):
            name, value = "text", list(column)
        elif all(isinstance(t, Tensor) and t.is_floating_point() for t in column):
            if column[0].ndim == 1:
                name, value = next(names, None), pad_sequence(list(column), batch_first=True)
            elif column[0].ndim == 2:
                name, value = "text_embeds", torch.stack(column)
        if name is None or name in batch:
            kinds = " or ".join(sorted({describe(item) for item in column}))
            fail("dataset", kinds, f"{', '.join(waves)} (samples,), a text, text_embeds", TypeError)
        batch[name] = value
    return batch
