"""Rendered notes with random captions, detuned and joined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast._checks import check_not_negative_int, fail
from musiclm_fast.datasets.random_words import with_extra_words
from musiclm_fast.demo.instruments import (
    INSTRUMENTS,
    TRAIN_TEMPLATES,
    Instrument,
    fill,
    register_of,
)
from musiclm_fast.demo.rendering import NoteSet


class CaptionedNotes(Dataset):
    """Notes with a random caption on each access, for contrastive training.

    Each clip gets a random gain, and either a random silence before the note or the end of another
    note of the same instrument, as in a melody. So neither loudness nor onset distinguishes
    instruments. Each caption gets a random template and synonym.

    Args:
        notes: the rendered notes.
        instruments: names of each program in captions.
        indices: of the notes that are used; None for all.
        templates: forms of the captions, with fields ``{a}``, ``{name}`` and ``{register}``.
        gain_db: largest change of level in either direction, in dB; 0 for none.
        max_delay: largest silence before a note, in seconds; 0 for none.
        joined: share of clips with two notes.
        detune_cents: largest detuning in either direction, in cents; 0 for none.
        extra_words: maximum number of random words before and after a caption, see
            :func:`captions.with_extra_words`; 0 for none.
        generator: of all draws; None is torch's global one.
    """

    def __init__(
        self,
        notes: NoteSet,
        instruments: Sequence[Instrument] = INSTRUMENTS,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        templates: Sequence[str] = TRAIN_TEMPLATES,
        gain_db: float = 12.0,
        max_delay: float = 0.1,
        joined: float = 0.5,
        detune_cents: float = 0.0,
        extra_words: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_not_negative_int("extra_words", extra_words)
        self.notes, self.templates, self.generator = notes, tuple(templates), generator
        self.indices = np.arange(len(notes)) if indices is None else np.asarray(indices)
        self.by_program = {item.program: item for item in instruments}
        self.gain_db, self.max_delay = gain_db, round(max_delay * notes.sample_rate)
        self.joined, self.fade = joined, round(0.02 * notes.sample_rate)
        self.detune_cents, self.extra_words = detune_cents, extra_words
        program = notes.program[self.indices]
        self.relatives = {int(p): self.indices[program == p] for p in np.unique(program)}
        unnamed = sorted(set(self.relatives) - set(self.by_program))
        if unnamed:
            fail("instruments", f"none for programs {unnamed}", "one for each program of notes")

    def __len__(self) -> int:
        return len(self.indices)

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator).item()

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        note = int(self.indices[index])
        wav = self._detuned(self.notes.audio(note))  # (samples,)
        if self._uniform(0, 1) < self.joined:
            relatives = self.relatives[int(self.notes.program[note])]
            other = self.notes.audio(int(relatives[self._below(len(relatives))]))
            wav = self._phrase(wav, self._detuned(other))
        elif self.max_delay:
            delay = self._below(self.max_delay + 1)
            wav = torch.cat([wav.new_zeros(delay), wav[: len(wav) - delay]])
        gain = 10 ** (self._uniform(-self.gain_db, self.gain_db) / 20)
        return wav * gain, self.caption(index)

    def _detuned(self, wav: Tensor) -> Tensor:
        """The note played a little faster or slower; silence where it ends too early."""
        if not self.detune_cents:
            return wav
        speed = 2 ** (self._uniform(-self.detune_cents, self.detune_cents) / 1200)
        at = np.arange(len(wav)) * speed
        played = np.interp(at, np.arange(len(wav)), wav.numpy(), right=0.0)
        return torch.from_numpy(played.astype(np.float32))

    def _phrase(self, first: Tensor, second: Tensor) -> Tensor:
        """A part of one note that fades out, then the beginning of another."""
        size = len(first)
        start = self._below(size // 4 + 1)
        length = self._below(size // 2 + 1) + size // 4
        part = first[start : start + length].clone()
        fade = min(self.fade, length)
        part[length - fade :] *= torch.linspace(1, 0, fade)
        return torch.cat([part, second[: size - length]])

    def caption(self, index: int) -> str:
        """A caption of clip ``index``."""
        note = int(self.indices[index])
        item = self.by_program[int(self.notes.program[note])]
        names = (item.name, *item.synonyms)
        # The name itself is drawn more often than any synonym.
        name = item.name if self._uniform(0, 1) < 0.5 else names[self._below(len(names))]
        form = self.templates[self._below(len(self.templates))]
        text = fill(form, name, register_of(int(self.notes.pitch[note])))
        return with_extra_words(text, self.extra_words, self._below)
