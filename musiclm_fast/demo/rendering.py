"""Notes rendered from a soundfont, with a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checks import check_positive, check_positive_int, fail
from musiclm_fast._files import atomic_file

RENDER_VERSION = 1  # part of the cache key: raise it when rendered samples change


PCM_SCALE = 32767.0


class DemoExtraMissing(ImportError):
    """A package of the demo is not installed; the message has the command that installs it."""


@dataclass
class NoteSet:
    """Rendered notes.

    Args:
        pcm: ``(n, samples)`` int16, the clips; 32767 is full scale.
        program, pitch, velocity: ``(n,)`` int64, of each clip.
        sample_rate: in Hz.
    """

    pcm: np.ndarray
    program: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    sample_rate: int

    def __len__(self) -> int:
        return len(self.pcm)

    def audio(self, index: Any) -> Tensor:
        """Clips at ``index`` as float32 in [-1, 1], ``(samples,)`` or ``(n, samples)``."""
        return torch.from_numpy(np.asarray(self.pcm[index], np.float32) / PCM_SCALE)


def find_soundfont() -> Path:
    """Path of the General MIDI soundfont, without importing the package that ships it.

    The environment variable ``MUSICLM_FAST_SOUNDFONT`` names another ``.sf2`` file.

    Raises:
        FileNotFoundError: the variable names a file that does not exist.
        DemoExtraMissing: pretty_midi is not installed.
    """
    chosen = os.environ.get("MUSICLM_FAST_SOUNDFONT")
    if chosen:
        path = Path(chosen)
        if not path.is_file():
            raise FileNotFoundError(f"MUSICLM_FAST_SOUNDFONT: no file {chosen!r}")
        return path
    found = importlib.util.find_spec("pretty_midi")
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).rglob("TimGM6mb.sf2")):
            return path
    raise DemoExtraMissing(
        "the General MIDI soundfont comes with pretty_midi, which is not installed: "
        "pip install pretty_midi, or set MUSICLM_FAST_SOUNDFONT to an .sf2 file"
    )


def _load_renderer() -> tuple[Any, Any]:
    try:
        import soxr
        import tinysoundfont
    except ImportError as error:
        # tinysoundfont asks for pyaudio, which has no Linux wheel and which rendering never uses.
        raise DemoExtraMissing(
            f"rendering needs soxr and tinysoundfont ({error}): "
            "pip install soxr && pip install --no-deps tinysoundfont"
        ) from error
    return tinysoundfont, soxr


class _Renderer:
    """Renders single notes; the samples of a note do not depend on the notes before it.

    The synthesizer runs at twice the output rate: below that some of the soundfont's resonant
    filters are so close to the Nyquist frequency that they are unstable (peaks of 25).
    """

    def __init__(self, soundfont: Path, sample_rate: int, seconds: float) -> None:
        tinysoundfont, self.soxr = _load_renderer()
        self.rate, self.inner_rate = sample_rate, 2 * sample_rate
        self.samples = round(seconds * sample_rate)
        self.sustained = round(0.8 * seconds * self.inner_rate)  # then the key is released
        self.released = 2 * self.samples - self.sustained
        self.synth = tinysoundfont.Synth(samplerate=self.inner_rate)
        self.font = self.synth.sfload(str(soundfont))

    def _generate(self, samples: int) -> np.ndarray:
        stereo = np.frombuffer(self.synth.generate(samples), dtype=np.float32)
        return stereo.reshape(-1, 2).mean(axis=1)

    def __call__(self, program: int, pitch: int, velocity: int) -> np.ndarray:
        synth = self.synth
        synth.program_select(0, self.font, 0, program)
        synth.noteon(0, pitch, velocity)
        sustained = self._generate(self.sustained)
        synth.noteoff(0, pitch)
        note = np.concatenate([sustained, self._generate(self.released)])
        synth.sounds_off()
        # Silence until every voice has faded, else the next note would overlap with it.
        self._generate(self.inner_rate // 10)
        note = self.soxr.resample(note, self.inner_rate, self.rate, quality="HQ")
        note = note[: self.samples]
        return np.pad(note, (0, self.samples - len(note)))


def _to_pcm(note: np.ndarray, peak: float = 0.5, floor: float = 1e-3) -> np.ndarray:
    """int16 samples with the given peak; a note below ``floor`` (about -60 dB) becomes silence.

    Loudness carries no information about the instrument; the scaled clip uses all 16 bits.
    """
    loudest = float(np.abs(note).max(initial=0.0))
    gain = peak / loudest if loudest > floor else 0.0
    return np.round(note * (gain * PCM_SCALE)).astype(np.int16)


def render_notes(
    programs: Iterable[int],
    pitches: Iterable[int],
    velocities: Iterable[int] = (56, 88, 120),
    *,
    sample_rate: int = 16000,
    seconds: float = 1.0,
    cache_folder: str | os.PathLike[str] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> NoteSet:
    """Render every program at every pitch and velocity, one note per clip.

    A key is held for 80% of the clip, then released. Clips are scaled to one peak; combinations
    that the soundfont leaves silent (a reed far above its range, say) are left out. The
    samples are a function of the arguments.

    Args:
        programs: General MIDI programs, 0 to 127.
        pitches: MIDI pitches, 0 to 127.
        velocities: MIDI velocities, 1 to 127.
        sample_rate: of the clips, in Hz.
        seconds: length of a clip.
        cache_folder: folder of rendered sets as ``.npz`` files; None for no cache.
        progress: wraps the programs while they are rendered, as ``tqdm.tqdm`` does.

    Returns:
        A :class:`NoteSet`, ordered by program, pitch, velocity.

    Raises:
        ValueError: a program, pitch or velocity out of range, or none at all.
        DemoExtraMissing: a package that rendering needs is not installed.
    """
    chosen = {}
    for name, values, smallest in (
        ("programs", programs, 0),
        ("pitches", pitches, 0),
        ("velocities", velocities, 1),
    ):
        chosen[name] = sorted({int(value) for value in values})
        if not chosen[name] or chosen[name][0] < smallest or chosen[name][-1] > 127:
            fail(name, chosen[name], f"at least one number from {smallest} to 127")
    check_positive_int("sample_rate", sample_rate)
    check_positive("seconds", seconds)
    soundfont = find_soundfont()

    cached = None
    if cache_folder is not None:
        what = (RENDER_VERSION, soundfont.name, soundfont.stat().st_size, sample_rate, seconds)
        key = hashlib.sha256(repr((*what, *chosen.items())).encode()).hexdigest()[:16]
        cached = Path(cache_folder) / f"general-midi-{key}.npz"
        notes = _read_cache(cached)
        if notes is not None:
            return notes

    render = _Renderer(soundfont, sample_rate, seconds)
    clips, labels = [], []
    for program in progress(chosen["programs"]) if progress else chosen["programs"]:
        for pitch in chosen["pitches"]:
            for velocity in chosen["velocities"]:
                pcm = _to_pcm(render(program, pitch, velocity))
                if pcm.any():
                    clips.append(pcm)
                    labels.append((program, pitch, velocity))
    if not clips:
        fail("pitches", chosen["pitches"], "a pitch at which a chosen program sounds")
    program, pitch, velocity = np.array(labels, np.int64).T
    notes = NoteSet(np.stack(clips), program, pitch, velocity, sample_rate)
    if cached is not None:
        _write_cache(cached, notes)
    return notes


def _read_cache(path: Path) -> NoteSet | None:
    """The cached set, or None if it is missing or incomplete."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            fields = {name: data[name] for name in ("pcm", "program", "pitch", "velocity")}
            return NoteSet(**fields, sample_rate=int(data["sample_rate"]))
    except Exception:  # numpy and zipfile raise various errors for a damaged file: render again
        return None


def _write_cache(path: Path, notes: NoteSet) -> None:
    with atomic_file(path, durable=False) as file:
        np.savez(file, **vars(notes))
