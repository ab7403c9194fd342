"""Padded batches of clips, and groups of clips of similar lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_dtype,
    check_floating,
    check_ndim,
    check_positive_int,
    check_shape,
    describe,
    fail,
    is_readable,
)
from musiclm_fast.audio.resampling import resample


def as_batch(
    wavs: Tensor | Sequence[Tensor],
    lengths: Tensor | None = None,
    *,
    from_hz: int | None = None,
    to_hz: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One padded batch of clips, and their lengths where these differ.

    Args:
        wavs: ``(B, samples)``, or B tensors ``(samples,)``.
        lengths: ``(B,)`` integer samples of each clip of a padded batch.
        from_hz: rate of wavs, if it differs from to_hz.
        to_hz: target rate; None if the model does not define its rate.

    Returns:
        ``(B, samples)`` and ``(B,)`` int64, or None if all clips are as long as the batch.

    Raises:
        ValueError, TypeError: wrong shape or dtype, no clips, lengths that do not fit or stand
            beside a list, a rate that cannot be changed.
    """
    if from_hz is not None:
        check_positive_int("input_sample_hz", from_hz)
        if to_hz is None:
            fail("input_sample_hz", from_hz, "None: this front end has no sample_hz")
    if not isinstance(wavs, Tensor):
        if lengths is not None:
            fail("lengths", describe(lengths), "None beside a list of clips")
        if not isinstance(wavs, (list, tuple)) or not wavs:
            fail("wavs", repr(wavs), "a tensor (B, samples) or a list of at least one clip")
        for clip, wav in enumerate(wavs):
            check_ndim(f"wavs[{clip}]", wav, 1, "(samples,): mono; mix stereo down first")
            check_floating(f"wavs[{clip}]", wav)
        return _padded([_changed(wav, from_hz, to_hz) for wav in wavs])
    check_ndim("wavs", wavs, 2, "(B, samples): mono; mix stereo down first")
    check_padded("wavs", wavs, lengths)
    if lengths is None:
        return _changed(wavs, from_hz, to_hz), None
    lengths = lengths.long()
    if from_hz is None or from_hz == to_hz:
        return wavs, lengths
    clips = [wav[:length] for wav, length in zip(wavs, lengths.tolist(), strict=True)]
    return _padded([_changed(wav, from_hz, to_hz) for wav in clips])


def check_padded(name: str, clips: Tensor, lengths: Tensor | None) -> None:
    """``clips (B, ..., T)`` are floating, at least one, and lengths, if given, are 1 to T."""
    check_floating(name, clips)
    if clips.shape[0] == 0:
        fail(name, "an empty batch", "at least one clip")
    if lengths is None:
        return
    check_shape("lengths", lengths, (clips.shape[0],), "(B,)")
    check_dtype("lengths", lengths, (torch.int64, torch.int32))
    size = clips.shape[-1]
    for clip, length in enumerate(lengths.tolist() if is_readable(lengths) else ()):
        if not 0 < length <= size:
            fail("lengths", f"{length} of clip {clip}", f"1 to {size}")


def _changed(wav: Tensor, from_hz: int | None, to_hz: int | None) -> Tensor:
    return wav if from_hz is None or to_hz is None else resample(wav, from_hz, to_hz)


def _padded(clips: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    lengths = [len(clip) for clip in clips]
    if len(set(lengths)) == 1:
        return torch.stack(clips), None
    # lengths stay on the CPU: groups are formed without waiting for a device
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor(lengths)


def similar_lengths(lengths: Sequence[int], spread: float) -> list[list[int]]:
    """Split clips into groups whose shortest is at least ``spread`` times their longest.

    Args:
        lengths: of the clips, in any unit.
        spread: between 0 (one group) and 1 (a group per length).

    Returns:
        The clips' indices, longest group first.
    """
    order = sorted(range(len(lengths)), key=lambda clip: -lengths[clip])
    groups: list[list[int]] = []
    longest = 0
    for clip in order:
        if not groups or lengths[clip] < spread * longest:
            groups.append([])
            longest = lengths[clip]
        groups[-1].append(clip)
    return groups
