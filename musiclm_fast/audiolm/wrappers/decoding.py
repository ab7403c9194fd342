"""Decoding of acoustic tokens to waves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import fail


def decode_rows(codec: Any, ids: Tensor, padding: Tensor) -> Tensor | list[Tensor | None]:
    """Waves of acoustic tokens.

    Args:
        codec: has ``decode_from_codebook_indices``.
        ids: ``(B, steps, quantizers)``.
        padding: ``(B, steps)`` bool, time steps to leave out.

    Returns:
        ``(B, samples)``; with padding, a list of ``(samples,)``, None for an empty row.
    """
    if codec is None:
        fail("codec", None, "a codec, to make waves")
    if not bool(padding.any()):
        wave: Tensor = codec.decode_from_codebook_indices(ids)
        if wave.shape[0] != ids.shape[0]:
            # audiolm-pytorch's EncodecWrapper sums the rows of a batch, so decode them singly.
            rows = [codec.decode_from_codebook_indices(row[None]) for row in ids]
            wave = torch.cat(rows)
        return wave.reshape(ids.shape[0], -1)
    waves: list[Tensor | None] = []
    for row, left_out in zip(ids, padding, strict=True):
        row = row[~left_out]
        waves.append(
            codec.decode_from_codebook_indices(row[None]).reshape(-1) if len(row) else None
        )
    return waves
