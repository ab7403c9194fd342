"""Training pitches and held-out pitches."""

from __future__ import annotations

from dataclasses import dataclass

from musiclm_fast._checks import check_positive_int, fail


@dataclass(frozen=True)
class PitchSplit:
    """MIDI pitches for training and two kinds of held-out pitches.

    Args:
        train: pitches of the training notes, at every velocity.
        held_out: pitches between training pitches, used at no velocity in training.
        octave: a whole octave that training does not use.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    octave: tuple[int, ...]


def split_by_pitch(low: int = 36, high: int = 95, every: int = 4, octave: int = 72) -> PitchSplit:
    """Split ``low`` to ``high`` (MIDI pitches, both included) by pitch.

    Args:
        low, high: the range; 60 is middle C.
        every: of the pitches outside the octave each ``every``-th is held out.
        octave: lowest of twelve pitches that are held out together.

    Returns:
        A :class:`PitchSplit`; its three tuples share no pitch.

    Raises:
        ValueError: the range or the octave lies outside 0 to 127, or too few pitches are left.
    """
    if not 0 <= low < high <= 127:
        fail("low, high", (low, high), "0 <= low < high <= 127")
    check_positive_int("every", every)
    if every < 2:
        fail("every", every, "at least 2: with 1 nothing is left to train on")
    if not low <= octave <= high - 11:
        fail("octave", octave, f"a pitch from low = {low} to high - 11 = {high - 11}")
    whole = tuple(range(octave, octave + 12))
    rest = [pitch for pitch in range(low, high + 1) if pitch not in whole]
    # The lowest pitch stays in training, so that held-out ones have neighbours on both sides.
    held_out = tuple(rest[every // 2 :: every])
    train = tuple(pitch for pitch in rest if pitch not in held_out)
    if not held_out or not train:
        fail("low, high", (low, high), f"more pitches than {len(rest)} outside the octave")
    return PitchSplit(train, held_out, whole)
