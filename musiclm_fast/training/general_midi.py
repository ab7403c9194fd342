"""Real audio without a network: General MIDI instruments rendered to captioned clips.

The 128 instruments of a General MIDI soundfont are sampled recordings, so single notes of them
make a small, varied and exactly reproducible set of sounds with known names. The soundfont ships
with the PyPI package ``pretty_midi`` and is rendered by ``tinysoundfont``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast._checks import check_not_negative_int, check_positive, check_positive_int, fail
from musiclm_fast.training.captions import with_extra_words

__all__ = [
    "INSTRUMENTS",
    "PROMPT_TEMPLATES",
    "TRAIN_TEMPLATES",
    "CaptionedNotes",
    "Instrument",
    "NoteSet",
    "PitchSplit",
    "default_cache_folder",
    "find_soundfont",
    "render_notes",
    "split_by_pitch",
    "zero_shot_prompts",
]

RENDER_VERSION = 1  # part of the cache key: raise it when rendered samples change
PCM_SCALE = 32767.0


class DemoExtraMissing(ImportError):
    """A package of the demo is not installed; the message has the command that installs it."""


@dataclass(frozen=True)
class Instrument:
    """One General MIDI program.

    Args:
        program: 0 to 127.
        name: the General MIDI name in lower case, the label of zero-shot classification.
        synonyms: other ways to say it, used by captions.
        family: one of the sixteen General MIDI families.
    """

    program: int
    name: str
    synonyms: tuple[str, ...]
    family: str


# One line per program: the General MIDI name, then synonyms.
_TABLE: dict[str, str] = {
    "piano": """
        acoustic grand piano / grand piano / concert grand
        bright acoustic piano / bright upright piano / bright piano
        electric grand piano / amplified grand piano / stage piano of the seventies
        honky-tonk piano / detuned saloon piano / barroom piano
        electric piano / rhodes piano / mellow tine piano
        fm electric piano / digital electric piano / dx electric piano
        harpsichord / baroque harpsichord / cembalo
        clavinet / funky clavinet / electric clavichord
    """,
    "chromatic percussion": """
        celesta / celeste / keyboard of steel plates
        glockenspiel / orchestra bells / bright metal bars
        music box / wind-up music box / musical box
        vibraphone / vibes / jazz vibraphone
        marimba / wooden marimba / mellow wooden bars
        xylophone / hard wooden bars / bright xylophone
        tubular bells / orchestral chimes / church chimes
        dulcimer / hammered dulcimer / santur
    """,
    "organ": """
        drawbar organ / hammond organ / tonewheel organ
        percussive organ / organ with percussion / clicky organ
        rock organ / overdriven organ / rotary speaker organ
        church organ / pipe organ / cathedral organ
        reed organ / harmonium / pump organ
        accordion / piano accordion / french accordion
        harmonica / mouth organ / blues harp
        tango accordion / bandoneon / argentine bandoneon
    """,
    "guitar": """
        nylon string guitar / classical guitar / spanish guitar
        steel string guitar / acoustic folk guitar / western guitar
        jazz guitar / hollow body guitar / archtop guitar
        clean electric guitar / undistorted electric guitar / chorus guitar
        muted guitar / palm muted guitar / damped electric guitar
        overdriven guitar / crunchy electric guitar / overdrive guitar
        distortion guitar / heavy metal guitar / fuzzy electric guitar
        guitar harmonics / flageolet guitar tones / guitar overtones
    """,
    "bass": """
        acoustic bass / upright bass / plucked double bass
        fingered bass / electric bass played with fingers / finger bass
        picked bass / electric bass played with a pick / plectrum bass
        fretless bass / singing fretless bass / gliding electric bass
        slap bass / thumb slapped bass / funk slap bass
        popped bass / second slap bass / snapping pop bass
        synth bass / analog synth bass / resonant synthesizer bass
        rubber synth bass / second synth bass / punchy synthesizer bass
    """,
    "strings": """
        violin / solo violin / classical violin
        viola / solo viola / alto fiddle
        cello / violoncello / solo cello
        contrabass / bowed double bass / arco bass
        tremolo strings / trembling strings / tremolo string section
        pizzicato strings / plucked string section / pizzicato
        orchestral harp / concert harp / plucked harp
        timpani / kettle drum / orchestral kettledrums
    """,
    "ensemble": """
        string ensemble / string orchestra / orchestral strings
        slow strings / slow string ensemble / soft swelling strings
        synth strings / synthesizer strings / analog string machine
        second synth strings / warm string synthesizer / dark string machine
        choir aahs / choir singing aah / vocal choir
        voice oohs / voices singing ooh / oohing vocals
        synth voice / synthetic voice / vocoder voice
        orchestra hit / orchestral stab / full orchestra accent
    """,
    "brass": """
        trumpet / solo trumpet / bright trumpet
        trombone / slide trombone / tenor trombone
        tuba / bass tuba / deep tuba
        muted trumpet / trumpet with a mute / harmon mute trumpet
        french horn / orchestral horn / horns
        brass section / brass ensemble / big band brass
        synth brass / synthesizer brass / analog brass
        soft synth brass / second synth brass / mellow synthesizer brass
    """,
    "reed": """
        soprano sax / soprano saxophone / high saxophone
        alto sax / alto saxophone / smooth saxophone
        tenor sax / tenor saxophone / jazz saxophone
        baritone sax / baritone saxophone / bari sax
        oboe / orchestral oboe / double reed oboe
        english horn / cor anglais / alto oboe
        bassoon / fagotto / low double reed
        clarinet / b flat clarinet / single reed clarinet
    """,
    "pipe": """
        piccolo / piccolo flute / small flute
        flute / concert flute / transverse flute
        recorder / wooden recorder / block flute
        pan flute / panpipes / andean pipes
        blown bottle / bottle blow / air over a bottle
        shakuhachi / japanese bamboo flute / breathy bamboo flute
        whistle / human whistle / whistling
        ocarina / clay ocarina / vessel flute
    """,
    "synth lead": """
        square lead / square wave synth / hollow square wave
        sawtooth lead / saw wave synth / buzzing sawtooth wave
        calliope lead / steam calliope / synth calliope
        chiff lead / chiffy synth lead / breathy attack synth
        charang lead / guitar-like synth lead / distorted synth lead
        voice lead / solo vox lead / vocal synth lead
        fifths lead / sawtooth in fifths / parallel fifths synth
        bass and lead / fat bass lead / layered synth lead
    """,
    "synth pad": """
        new age pad / fantasia pad / bell-like pad
        warm pad / soft analog pad / mellow pad
        polysynth pad / poly synth / bright polyphonic synth
        choir pad / space voice pad / airy choir synth
        bowed glass pad / bowed pad / glassy pad
        metallic pad / metal pad / shimmering metal synth
        halo pad / angelic pad / glowing synth halo
        sweep pad / filter sweep pad / slowly opening pad
    """,
    "synth effects": """
        ice rain / rain effect / icy synth rain
        soundtrack / cinematic soundtrack synth / rising fifths pad
        crystal / crystal synth / glassy synth bells
        atmosphere / atmospheric guitar synth / plucked atmosphere
        brightness / bright synth choir / shining synth
        goblins / goblin synth / eerie bubbling synth
        echo drops / echoing synth drops / echoes
        star theme / sci-fi star theme / space synth
    """,
    "ethnic": """
        sitar / indian sitar / buzzing sitar
        banjo / bluegrass banjo / five string banjo
        shamisen / japanese shamisen / japanese lute
        koto / japanese koto / japanese zither
        kalimba / thumb piano / mbira
        bagpipe / scottish bagpipes / highland pipes
        fiddle / country fiddle / folk fiddle
        shanai / shehnai / indian oboe
    """,
    "percussive": """
        tinkle bell / tinkling bell / small hand bell
        agogo / agogo bells / brazilian cowbell
        steel drums / steel pan / caribbean steelpan
        woodblock / wood block / hollow wood knock
        taiko drum / japanese taiko / huge taiko
        melodic tom / tuned tom / tom drum
        synth drum / electronic tom / synthesizer drum
        reverse cymbal / backwards cymbal / reversed crash
    """,
    "sound effects": """
        guitar fret noise / fret squeak / finger squeak on strings
        breath noise / breathing / flute breath
        seashore / ocean waves / surf
        bird tweet / bird song / chirping birds
        telephone ring / ringing telephone / phone bell
        helicopter / helicopter rotor / chopper
        applause / clapping audience / cheering crowd
        gunshot / gun shot / firing gun
    """,
}


def _parse_table() -> tuple[Instrument, ...]:
    rows = [(family, line) for family, text in _TABLE.items() for line in text.split("\n")]
    instruments: list[Instrument] = []
    for family, line in rows:
        if line.strip():
            name, *synonyms = (part.strip() for part in line.split("/"))
            instruments.append(Instrument(len(instruments), name, tuple(synonyms), family))
    return tuple(instruments)


INSTRUMENTS: tuple[Instrument, ...] = _parse_table()

# Captions of the training notes; {name} is the name or a synonym, {a} its article,
# {register} how high it sounds.
TRAIN_TEMPLATES: tuple[str, ...] = (
    "{name}",
    "{a} {name}",
    "the sound of {a} {name}",
    "a recording of {a} {name}",
    "a {register} note on {a} {name}",
    "{name}, {register} register",
    "a single note played by {a} {name}",
    "someone plays the {name}",
)

# Prompts of the evaluation: no training caption has these forms.
PROMPT_TEMPLATES: tuple[str, ...] = (
    "this is {a} {name}",
    "music played with {a} {name}",
    "one hears the {name}",
)


def zero_shot_prompts(
    instruments: Sequence[Instrument], templates: Sequence[str] = PROMPT_TEMPLATES
) -> list[list[str]]:
    """Text prompts of a zero-shot classification, one list of paraphrases per instrument.

    Args:
        instruments: the labels.
        templates: forms with a ``{name}`` field, and ``{a}`` for its article.

    Returns:
        ``prompts[i][j]``: template j filled with the name of instrument i.
    """
    return [[_fill(form, item.name) for form in templates] for item in instruments]


def _fill(template: str, name: str, register: str = "") -> str:
    """A caption from its template."""
    return template.format(a="an" if name[0] in "aeiou" else "a", name=name, register=register)


def _register(pitch: int) -> str:
    """How high a MIDI pitch sounds, in a word."""
    return "low" if pitch < 52 else "middle" if pitch < 72 else "high"


@dataclass(frozen=True)
class PitchSplit:
    """MIDI pitches to train on and two kinds of pitches that training never hears.

    Args:
        train: pitches of the training notes, at every velocity.
        held_out: pitches between training pitches, used at no velocity in training.
        octave: a whole octave of which training hears nothing.
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


@dataclass
class NoteSet:
    """Rendered notes.

    Args:
        pcm: ``(n, samples)`` int16, the clips; 32767 is full scale.
        program, pitch, velocity: ``(n,)`` int64, what each clip is.
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
    filters lie so near to the Nyquist frequency that they become unstable (peaks of 25).
    """

    def __init__(self, soundfont: Path, sample_rate: int, seconds: float) -> None:
        tinysoundfont, self.soxr = _load_renderer()
        self.rate, self.inner_rate = sample_rate, 2 * sample_rate
        self.samples = round(seconds * sample_rate)
        self.sustained = round(0.8 * seconds * self.inner_rate)  # then the key is let go
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
        # Silence until every voice has faded, else the next note would start on its remains.
        self._generate(self.inner_rate // 10)
        note = self.soxr.resample(note, self.inner_rate, self.rate, quality="HQ")
        note = note[: self.samples]
        return np.pad(note, (0, self.samples - len(note)))


def _to_pcm(note: np.ndarray, peak: float = 0.5, floor: float = 1e-3) -> np.ndarray:
    """int16 samples with the given peak; a note below ``floor`` (about -60 dB) becomes silence.

    Loudness says nothing about the instrument, and 16 bits suit a clip that fills them.
    """
    loudest = float(np.abs(note).max(initial=0.0))
    gain = peak / loudest if loudest > floor else 0.0
    return np.round(note * (gain * PCM_SCALE)).astype(np.int16)


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/musiclm_fast``, or ``~/.cache/musiclm_fast``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "musiclm_fast"


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
    that the soundfont leaves silent (a reed far above its range, say) are left out. The same
    arguments give the same samples, whatever was rendered before.

    Args:
        programs: General MIDI programs, 0 to 127.
        pitches: MIDI pitches, 0 to 127.
        velocities: MIDI velocities, 1 to 127.
        sample_rate: of the clips, in Hz.
        seconds: length of a clip.
        cache_folder: where rendered sets are kept as ``.npz`` files; None keeps none.
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
    """The cached set, or None if there is none or the file is not whole."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            fields = {name: data[name] for name in ("pcm", "program", "pitch", "velocity")}
            return NoteSet(**fields, sample_rate=int(data["sample_rate"]))
    except Exception:  # whatever numpy or zipfile make of a damaged file: render anew
        return None


def _write_cache(path: Path, notes: NoteSet) -> None:
    """Write next to ``path`` and move it there, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".npz.tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **vars(notes))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class CaptionedNotes(Dataset):
    """Notes with a caption drawn anew each time, for contrastive training.

    Each clip gets a random gain, and either a random silence before the note or a neighbour: the
    end of a first note and the beginning of a second one of the same instrument, as in a melody.
    So neither loudness nor where a note begins tells instruments apart. Each caption gets a random
    template and synonym.

    Args:
        notes: the rendered notes.
        instruments: what captions call each program.
        indices: which of the notes; None for all. No other note is ever heard.
        templates: forms of the captions, with fields ``{a}``, ``{name}`` and ``{register}``.
        gain_db: largest change of level either way, in dB; 0 changes nothing.
        max_delay: largest silence before a note, in seconds; 0 for none.
        phrases: share of clips with two notes.
        detune_cents: largest detuning either way, in hundredths of a semitone; 0 for none.
        extra_words: most random words before a caption and after it, see
            :func:`captions.with_extra_words`; 0 for none.
        generator: draws all of this; None is torch's global one.
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
        phrases: float = 0.5,
        detune_cents: float = 0.0,
        extra_words: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_not_negative_int("extra_words", extra_words)
        self.notes, self.templates, self.generator = notes, tuple(templates), generator
        self.indices = np.arange(len(notes)) if indices is None else np.asarray(indices)
        self.by_program = {item.program: item for item in instruments}
        self.gain_db, self.max_delay = gain_db, round(max_delay * notes.sample_rate)
        self.phrases, self.fade = phrases, round(0.02 * notes.sample_rate)
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
        if self._uniform(0, 1) < self.phrases:
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
        text = _fill(form, name, _register(int(self.notes.pitch[note])))
        return with_extra_words(text, self.extra_words, self._below)
