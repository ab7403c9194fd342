"""Short melodies of rendered notes, each of one instrument: the music demo's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast._checks import check_positive, check_positive_int, fail
from musiclm_fast._wording import plural
from musiclm_fast.demo.rendering import PCM_SCALE, NoteSet

BEAT_SECONDS = 0.25


# A note's length in beats, and how often it is drawn
_BEATS, _SHARES = (1, 2, 4), (0.3, 0.5, 0.2)


_MAJOR_PENTATONIC = (0, 2, 4, 7, 9)


_LARGEST_STEP = 7  # semitones between two successive notes


_FADE_SECONDS = 0.02


@dataclass
class MelodyDataset(Dataset[Tensor]):
    """Clips of one length, row i of instrument ``label[i]``.

    Args:
        pcm: ``(n, samples)`` int16; 32767 is full scale.
        label: ``(n,)`` int64, index into the programs.
        sample_rate: in Hz.
    """

    pcm: np.ndarray
    label: np.ndarray
    sample_rate: int

    def __len__(self) -> int:
        return len(self.pcm)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.pcm[index].astype(np.float32) / PCM_SCALE)

    def audio(self) -> Tensor:
        """All clips ``(n, samples)`` as float32 in [-1, 1]."""
        return torch.from_numpy(self.pcm.astype(np.float32) / PCM_SCALE)


def compose_melodies(
    notes: NoteSet,
    programs: Sequence[int],
    pitches: Sequence[int],
    count: int,
    seconds: float = 2.0,
    seed: int = 0,
    scale: bool = True,
) -> MelodyDataset:
    """Melodies from single notes: a random walk over the pitches of a major pentatonic scale.

    Notes last one, two or four beats of 0.25 s and are cut there with a short fade; each melody
    has one velocity. Each instrument's melodies depend on seed, program and count alone.

    Args:
        notes: rendered notes of at least four beats.
        programs: General MIDI programs, one per label.
        pitches: MIDI pitches that may sound.
        count: melodies per program.
        seconds: length of a clip.
        seed: of all draws.
        scale: use one scale; False uses all pitches.

    Returns:
        ``count`` clips per program, ordered by program.

    Raises:
        ValueError: notes that are too short, or a program that is silent at all pitches.
    """
    check_positive_int("count", count)
    check_positive("seconds", seconds)
    rate = notes.sample_rate
    beat = round(BEAT_SECONDS * rate)
    if notes.pcm.shape[1] < beat * max(_BEATS):
        fail(
            "notes",
            f"{plural(notes.pcm.shape[1], 'sample')} a note",
            f"at least {beat * max(_BEATS)}",
        )
    samples = round(seconds * rate)
    pcm = np.zeros((len(programs) * count, samples), np.int16)
    for label, program in enumerate(programs):
        own = np.flatnonzero((notes.program == program) & np.isin(notes.pitch, pitches))
        if not len(own):
            fail("programs", f"{program}, silent at all pitches", "programs that sound")
        draw = np.random.default_rng([seed, program])
        by_velocity = [own[notes.velocity[own] == v] for v in np.unique(notes.velocity[own])]
        for row in range(label * count, (label + 1) * count):
            clips = by_velocity[draw.integers(len(by_velocity))]
            if scale:
                clips = _in_scale(clips, notes.pitch[clips], int(draw.integers(12)))
            _write_melody(pcm[row], notes, clips, beat, draw)
    return MelodyDataset(pcm, np.repeat(np.arange(len(programs)), count), rate)


def _in_scale(clips: np.ndarray, pitch: np.ndarray, root: int) -> np.ndarray:
    kept = clips[np.isin((pitch - root) % 12, _MAJOR_PENTATONIC)]
    return kept if len(kept) else clips


def _write_melody(
    out: np.ndarray, notes: NoteSet, clips: np.ndarray, beat: int, draw: np.random.Generator
) -> None:
    pitch = notes.pitch[clips]
    now = draw.choice(pitch)
    fade = round(_FADE_SECONDS * notes.sample_rate)
    start = 0
    while start < len(out):
        length = min(beat * int(draw.choice(_BEATS, p=_SHARES)), len(out) - start)
        note = notes.pcm[clips[draw.choice(np.flatnonzero(pitch == now))]][:length].astype(float)
        note[-fade:] *= np.linspace(1, 0, len(note[-fade:]))
        out[start : start + length] = np.round(note)
        start += length
        near = pitch[np.abs(pitch - now) <= _LARGEST_STEP]
        others = near[near != now]
        now = draw.choice(others if len(others) else near)
