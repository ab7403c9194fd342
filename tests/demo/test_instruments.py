"""Rendered notes: what they are, how they are split, that they are the same every time."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from musiclm_fast.demo import rendering as general_midi
from musiclm_fast.demo.captioned_notes import CaptionedNotes
from musiclm_fast.demo.instruments import (
    INSTRUMENTS,
    PROMPT_TEMPLATES,
    TRAIN_TEMPLATES,
    zero_shot_prompts,
)
from musiclm_fast.demo.pitches import split_by_pitch
from musiclm_fast.demo.rendering import DemoExtraMissing, NoteSet, find_soundfont, render_notes

WHY = "needs the demo extra and tinysoundfont"


@pytest.fixture
def renderer():
    for package in ("tinysoundfont", "pretty_midi", "soxr"):
        pytest.importorskip(package, reason=WHY)


def silence(programs, pitches, samples=160, sample_rate=16000):
    """A set of silent notes, one per program and pitch."""
    labels = np.array([(program, pitch, 64) for program in programs for pitch in pitches])
    return NoteSet(np.zeros((len(labels), samples), np.int16), *labels.T, sample_rate)


def test_table_is_general_midi():
    assert [item.program for item in INSTRUMENTS] == list(range(128))
    assert len({item.family for item in INSTRUMENTS}) == 16
    at = {0: "acoustic grand piano", 40: "violin", 56: "trumpet", 73: "flute", 104: "sitar",
          127: "gunshot"}  # fmt: skip
    assert {program: INSTRUMENTS[program].name for program in at} == at
    said = [text for item in INSTRUMENTS for text in (item.name, *item.synonyms)]
    assert len(said) == len(set(said)), "one text for two instruments"
    assert all(len(item.synonyms) >= 2 for item in INSTRUMENTS)


@pytest.mark.parametrize(("low", "high", "every", "octave"), [(36, 95, 4, 72), (48, 71, 3, 48)])
def test_split_shares_no_pitch(low, high, every, octave):
    split = split_by_pitch(low, high, every, octave)
    parts = (split.train, split.held_out, split.octave)
    assert sorted(sum(parts, ())) == list(range(low, high + 1))
    assert split.octave == tuple(range(octave, octave + 12))
    assert all(a not in b for a in split.held_out for b in (split.train, split.octave))
    assert len(split.held_out) == (high - low + 1 - 12) // every


@pytest.mark.parametrize(
    "arguments", [(60, 50, 4, 50), (36, 95, 1, 72), (36, 95, 4, 90), (36, 200, 4, 72)]
)
def test_split_refuses(arguments):
    with pytest.raises(ValueError, match=r"low, high|every|octave"):
        split_by_pitch(*arguments)


def test_prompts_are_no_training_captions():
    assert not set(PROMPT_TEMPLATES) & set(TRAIN_TEMPLATES)
    prompts = zero_shot_prompts(INSTRUMENTS[:2])
    assert len(prompts) == 2
    assert all("acoustic grand piano" in text for text in prompts[0])


def test_captions_name_the_instrument():
    item = INSTRUMENTS[56]
    notes = CaptionedNotes(
        silence([56], [40, 60, 90]), generator=torch.Generator().manual_seed(0), max_delay=0.0
    )
    captions = {notes.caption(index) for index in (0, 1, 2) for _ in range(60)}
    assert all(any(n in text for n in (item.name, *item.synonyms)) for text in captions)
    assert len(captions) > 15  # many forms, many names
    low = " ".join(notes.caption(0) for _ in range(60))
    assert "low" in low
    assert "high " not in low


def test_extra_words_stand_around_the_caption():
    notes = silence([56], [60])
    plain = CaptionedNotes(notes, max_delay=0.0, templates=["{name}"])
    noisy = CaptionedNotes(notes, max_delay=0.0, templates=["{name}"], extra_words=2)
    names = {plain.caption(0) for _ in range(40)}
    texts = [noisy.caption(0) for _ in range(200)]
    assert all(any(name in text for name in names) for text in texts)
    around = [len(text.split()) - len(name.split()) for text in texts for name in names
              if name in text and not any(name in other and name != other and other in text
                                          for other in names)]  # fmt: skip
    assert 0 in around  # none on either side
    assert max(around) == 4
    assert len(set(texts)) > 150


def test_captioned_notes_vary_level_and_start_only():
    notes = silence([0], [60], samples=1600)
    notes.pcm[0, 0] = 16384  # a click at the start, half of full scale
    data = CaptionedNotes(notes, gain_db=6.0, max_delay=0.05, joined=0.0)
    for _ in range(40):
        wav, _ = data[0]
        assert wav.shape == (1600,)
        assert wav.dtype == torch.float32
        (at,) = wav.nonzero().flatten().tolist()
        assert at <= 0.05 * 16000
        assert 0.25 <= wav[at] <= 1.0


def test_detuning_moves_the_pitch_by_at_most_so_many_cents():
    notes = silence([0], [60], samples=16000)
    notes.pcm[0] = np.round(8000 * np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000))
    data = CaptionedNotes(notes, gain_db=0.0, max_delay=0.0, joined=0.0, detune_cents=50.0)
    window = np.hanning(8000)
    peaks = []
    for _ in range(30):
        wav = data[0][0].numpy()[:8000]
        peaks.append(np.abs(np.fft.rfft(window * wav, 64000)).argmax() * 16000 / 64000)
    cents = 1200 * np.log2(np.array(peaks) / 1000)
    assert np.abs(cents).max() <= 51
    assert cents.min() < -10
    assert cents.max() > 10


def test_joined_notes_are_two_of_one_instrument_in_the_chosen_part():
    notes = silence([3, 5], [40, 50, 60, 70], samples=1600)
    notes.pcm += 1000 * np.arange(1, 9, dtype=np.int16)[:, None]  # note i is i + 1, all along
    chosen = [0, 2, 5, 6]  # programs 3, 3, 5, 5
    data = CaptionedNotes(notes, indices=chosen, gain_db=0.0, joined=1.0)
    assert len(data) == 4
    seen = set()
    for _ in range(30):
        for index, note in enumerate(chosen):
            wav = (data[index][0] * 32.767).round().int()
            assert wav.shape == (1600,)
            assert wav[0] == note + 1
            second = int(wav[-1]) - 1
            assert second in chosen
            assert notes.program[second] == notes.program[note]
            assert set(wav[1200:].tolist()) == {second + 1}
            seen.add((note, second))
    assert len(seen) == 8


def test_captioned_notes_need_a_name_for_each_program():
    with pytest.raises(ValueError, match=r"instruments: .*\[7\]"):
        CaptionedNotes(silence([7], [60]), INSTRUMENTS[:5])


def test_rendering_is_repeatable_and_cached(renderer, tmp_path):
    arguments = dict(programs=[0, 73], pitches=[48, 60], velocities=[100], seconds=0.5)
    first = render_notes(**arguments, cache_folder=tmp_path)
    assert first.pcm.shape == (4, 8000)
    assert first.program.tolist() == [0, 0, 73, 73]
    assert first.pitch.tolist() == [48, 60, 48, 60]
    peak = np.abs(first.pcm.astype(int)).max(axis=1)
    np.testing.assert_allclose(peak, 0.5 * 32767, rtol=0.001)

    (cached,) = tmp_path.iterdir()  # and no temporary file
    again = render_notes(**arguments, cache_folder=tmp_path)
    np.testing.assert_array_equal(first.pcm, again.pcm)
    # A note does not depend on what was rendered before it.
    alone = render_notes(**{**arguments, "programs": [73], "pitches": [60]})
    np.testing.assert_array_equal(alone.pcm[0], first.pcm[3])

    cached.write_bytes(cached.read_bytes()[:1000])  # a damaged cache is rendered anew
    np.testing.assert_array_equal(render_notes(**arguments, cache_folder=tmp_path).pcm, first.pcm)
    assert cached.stat().st_size > 1000


def test_rendered_pitch_is_the_pitch(renderer):
    """A flute at A4 has its strongest partial at 440 Hz, an octave above at 880 Hz."""
    notes = render_notes([73], [69, 81], [100])
    for index, hertz in enumerate((440, 880)):
        power = torch.fft.rfft(notes.audio(index)[4000:12000]).abs()
        assert power.argmax().item() * 2 == pytest.approx(hertz, rel=0.02)


def test_silent_notes_are_left_out(renderer):
    # The baritone sax of the soundfont has no sound this high.
    assert len(render_notes([67], [60, 96], [100])) == 1
    with pytest.raises(ValueError, match="pitches"):
        render_notes([67], [96], [100])


@pytest.mark.parametrize(
    ("name", "value"),
    [("programs", [128]), ("programs", []), ("pitches", [-1]), ("velocities", [0])],
)
def test_render_refuses(name, value):
    arguments = {"programs": [0], "pitches": [60], "velocities": [100], name: value}
    with pytest.raises(ValueError, match=name):
        render_notes(**arguments)


def test_soundfont_by_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MUSICLM_FAST_SOUNDFONT", str(tmp_path / "none.sf2"))
    with pytest.raises(FileNotFoundError, match="MUSICLM_FAST_SOUNDFONT"):
        find_soundfont()
    (tmp_path / "none.sf2").touch()
    assert find_soundfont() == tmp_path / "none.sf2"


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.delenv("MUSICLM_FAST_SOUNDFONT", raising=False)
    monkeypatch.setattr(general_midi.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoExtraMissing, match="pip install pretty_midi"):
        find_soundfont()
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(DemoExtraMissing, match="--no-deps tinysoundfont"):
        general_midi._load_renderer()


def test_a_failed_write_leaves_no_file(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        general_midi._write_cache(tmp_path / "x.npz", silence([0], [60]))
    assert not os.listdir(tmp_path)
