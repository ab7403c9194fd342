"""Codec ids at a stage's boundaries: primes, and rows decoded to sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import describe, fail


def check_codebook(codec: Any, transformer: Any) -> None:
    """Refuse a codec whose codebooks are not as large as the stage's."""
    size = getattr(codec, "codebook_size", None)
    if isinstance(size, int) and size != transformer.codebook_size:
        fail("transformer", f"codebook_size={transformer.codebook_size}", f"the codec's, {size}")


def prime_ids(
    wrapper: Any, wave: Tensor | None, hz: int | None, ids: Tensor | None, batch: int,
    quantizers: slice, name: str,
) -> Tensor:  # fmt: skip
    """The prime's acoustic tokens ``(batch, n)``, from a wave, from ids or none."""
    if wave is not None and ids is not None:
        fail(name, "given", "None beside prime_wave")
    if wave is not None:
        ids = wrapper._acoustic_ids(wave.to(wrapper.device), hz)[..., quantizers]
    if ids is None:
        return torch.empty(batch, 0, dtype=torch.long, device=wrapper.device)
    if ids.shape[0] != batch:
        if ids.shape[0] != 1:
            fail(name, describe(ids), f"1 row or {batch}")
        ids = ids.expand(batch, *ids.shape[1:])
    return ids.to(wrapper.device).flatten(1)


def decode_rows(codec: Any, ids: Tensor, padding: Tensor) -> Tensor | list[Tensor | None]:
    """Waves of acoustic tokens.

    Args:
        codec: has ``decode_from_codebook_indices``.
        ids: ``(B, steps, quantizers)``.
        padding: ``(B, steps)`` bool, time steps to leave out.

    Returns:
        ``(B, samples)``, or a list of ``(samples,)`` (None for an empty one) where there is
        padding.
    """
    if codec is None:
        fail("codec", None, "a codec, to make waves")
    if not bool(padding.any()):
        wave: Tensor = codec.decode_from_codebook_indices(ids)
        if wave.shape[0] != ids.shape[0]:
            # audiolm-pytorch's EncodecWrapper adds the rows of a batch up: one by one then
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
