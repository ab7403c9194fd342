"""The music demo in small: from a MuLaN to classified sound; stopping changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from musiclm_fast.audiolm import Sampling
from musiclm_fast.cli import main
from musiclm_fast.demo.instruments import (
    INSTRUMENTS,
    PROMPT_TEMPLATES,
    TRAIN_TEMPLATES,
    zero_shot_prompts,
)
from musiclm_fast.demo.melodies import compose_melodies
from musiclm_fast.demo.mulan_run import DemoConfig
from musiclm_fast.demo.music_demo import classifier_table, run_music_demo
from musiclm_fast.demo.music_run import MusicDemo, MusicDemoConfig
from musiclm_fast.demo.rendering import NoteSet
from musiclm_fast.evaluation.instrument_classifier import (
    InstrumentClassifier,
    log_mel,
    nearest_clip,
)
from musiclm_fast.models.checkpoint import CheckpointError, save_checkpoint
from musiclm_fast.musiclm.project import MusicConfig, MusicProject
from tests.audiolm.test_tokenizers import RATE, notes
from tests.musiclm.test_project import make_mulan

for package in ("tinysoundfont", "pretty_midi", "soxr", "soundfile", "matplotlib"):
    pytest.importorskip(package, reason="needs the demo extra and tinysoundfont")

SIZES = MusicConfig(
    dim=16, depth=1, heads=1, residual_streams=1, semantic_tokens=12, codebook_size=10,
    codec_hop=512, condition_quantizers=2, condition_codes=6, window_seconds=0.5,
)  # fmt: skip
SMALL = MusicDemoConfig(
    instruments=6, melodies=3, known_melodies=2, seconds=1.0, sizes=SIZES, semantic_steps=3,
    coarse_steps=3, fine_steps=2, batch_size=4, num_samples=2,
    coarse_sampling=Sampling(0.5, 0.5, 1.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    path = tmp_path_factory.mktemp("mulan") / "mulan.pt"
    labels = [item.name for item in DemoConfig(instruments=8).chosen()]
    save_checkpoint(path, make_mulan(), sample_rate=RATE, clip_seconds=1.0, labels=labels)
    yield path
    patch.undo()


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A finished demo: (folder, results, what was said)."""
    folder, said = tmp_path_factory.mktemp("music") / "output", []
    return folder, run_music_demo(folder, SMALL, checkpoint=checkpoint, say=said.append), said


def test_it_writes_and_says(finished, capsys):
    folder, results, said = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert len(list((folder / "generated").glob("*.wav"))) == 6
    pictures = list(folder.glob("*.png"))
    assert len(pictures) == len(list(folder.glob("*.wav"))) == 6
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.with_suffix(".wav").is_file()
    table = classifier_table(results["classifier"], 6)
    assert table in said
    for row in ("pitches not trained on", "a ceiling", "generated, 6 prompts", "chance"):
        assert row in table
    for row in results["classifier"]:
        assert 0 <= row["top-1"] <= row["top-5"] <= 1
    ranks = [prompt["rank"] for prompt in results["prompts"].values()]
    generated = results["classifier"][0]
    assert generated["clips"] == "generated, 6 prompts"
    assert generated["top-5"] == pytest.approx(np.mean([rank <= 5 for rank in ranks]))
    command = ["generate", "a violin", "--music", str(folder), "--seconds", "0.5", "--seed", "1"]
    code = main([*command, "-o", str(folder / "violin.wav")])
    assert code == 0 or "ended at once" in capsys.readouterr().err


def test_a_finished_run_is_not_made_again(finished, checkpoint, monkeypatch):
    folder, results, _ = finished
    monkeypatch.setattr(MusicProject, "train", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(MusicProject, "musiclm", lambda *a, **k: pytest.fail("generated"))
    assert run_music_demo(folder, SMALL, checkpoint=checkpoint, say=lambda _: None) == results


def test_a_finished_run_with_earlier_names_of_fields(finished, checkpoint):
    folder, results, _ = finished
    config = dict(results["config"])
    config["phrases"] = config.pop("melodies")
    config["judged_phrases"] = config.pop("known_melodies")
    earlier = {**results, "config": config, "judge": results["classifier"]}
    del earlier["classifier"]
    (folder / "results.json").write_text(json.dumps(earlier))
    again = run_music_demo(folder, SMALL, checkpoint=checkpoint, say=lambda _: None)
    assert again == results


def test_other_runs_are_refused(finished, checkpoint, tmp_path):
    folder, _, _ = finished
    other = replace(SMALL, seed=1)
    with pytest.raises(CheckpointError, match="another seed"):
        run_music_demo(folder, other, checkpoint=checkpoint)
    (tmp_path / "semantic.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds semantic.pt of something else"):
        run_music_demo(tmp_path, SMALL, checkpoint=checkpoint)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        run_music_demo(tmp_path, SMALL, checkpoint=checkpoint)
    torch.manual_seed(1)
    anew = make_mulan()
    anew.audio_to_latents.weight.data.add_(1)
    labels = [item.name for item in DemoConfig(instruments=8).chosen()]
    save_checkpoint(tmp_path / "other.pt", anew, labels=labels)
    with pytest.raises(CheckpointError, match="another MuLaN"):
        run_music_demo(folder, SMALL, checkpoint=tmp_path / "other.pt")
    save_checkpoint(tmp_path / "unnamed.pt", anew)
    with pytest.raises(CheckpointError, match="names its instruments"):
        MusicDemo(SMALL, tmp_path, tmp_path / "unnamed.pt")
    assert main(["demo-music", "--checkpoint", str(tmp_path / "absent.pt")]) == 2
    with pytest.raises(ValueError, match="instruments"):
        MusicDemoConfig(instruments=5)


def test_a_stage_that_was_stopped_ends_as_one_that_never_was(tmp_path, monkeypatch):
    clips = notes(8, 0.5)
    weights = []
    for stopped_at in (None, 2):
        folder = tmp_path / str(stopped_at)
        project = MusicProject(folder, make_mulan(), replace(SIZES, residual_streams=2))
        project.fit(clips, RATE, progress=False)

        def train(project=project):
            return project.train(
                "coarse", clips, RATE, 5, 4, accelerate_kwargs={"cpu": True}, random_split_seed=3
            )

        if stopped_at is not None:
            from musiclm_fast.training.stages import CoarseTransformerTrainer

            loss = CoarseTransformerTrainer.loss

            def interrupted(self, inputs, loss=loss, at=stopped_at):
                if self.step == at:
                    os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
                return loss(self, inputs)

            with monkeypatch.context() as patch:
                patch.setattr(CoarseTransformerTrainer, "loss", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    train()
            saved = torch.load(folder / "coarse" / "coarse.latest", weights_only=True)
            assert saved["steps"] == stopped_at + 1
            assert torch.load(folder / "coarse.pt", weights_only=True)["steps"] == saved["steps"]
            torch.manual_seed(99)  # the state of the global generator does not matter
            project = MusicProject(folder)
        before = torch.get_rng_state()
        log = train(project)
        assert torch.equal(before, torch.get_rng_state())
        assert log["steps"] == 5
        weights.append(torch.load(folder / "coarse.pt", weights_only=True))
    assert weights[0]["steps"] == weights[1]["steps"] == 5
    for name, value in weights[0]["model"].items():
        assert torch.equal(value, weights[1]["model"][name]), name
    assert torch.equal(*(part["conditioning"]["embeds"] for part in weights))


@pytest.mark.slow
def test_killed_runs_end_as_one_that_never_was(finished, checkpoint, tmp_path):
    """SIGKILL as soon as each file is there; the same call goes on, and ends with the same."""
    _, results, _ = finished
    script = (
        "from tests.demo.test_music_demo import SMALL, run_music_demo\n"
        f"run_music_demo({str(tmp_path)!r}, SMALL, checkpoint={str(checkpoint)!r})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for awaited in ("coarse.pt", "generated/*.wav", "nothing"):
        process = subprocess.Popen([sys.executable, "-c", script], env=environment)
        while process.poll() is None and not list(tmp_path.glob(awaited)):
            time.sleep(0.02)
        process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL)
    assert code == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["classifier"] == results["classifier"]
    assert again["prompts"] == results["prompts"]


def test_prompts_are_unseen():
    names = [(item, name) for item in INSTRUMENTS for name in (item.name, *item.synonyms)]
    captions = {
        form.format(a=article, name=name, register=register)
        for (_, name), form, article, register in itertools.product(
            names, TRAIN_TEMPLATES, ("a", "an"), ("low", "middle", "high")
        )
    }
    prompts = {text for texts in zero_shot_prompts(INSTRUMENTS) for text in texts}
    assert len(prompts) == len(PROMPT_TEMPLATES) * len(INSTRUMENTS)
    assert not prompts & captions


# ---- melodies and classifier


def tones(programs=(0, 1), pitches=range(60, 72), velocities=(64, 112), seconds=1.0):
    """Notes of instruments that differ in their overtones and in how fast they fade."""
    time = np.arange(int(seconds * RATE)) / RATE
    rows = list(itertools.product(programs, pitches, velocities))
    clips = []
    for program, pitch, _ in rows:
        power, decay = (0.3, 2.5)[program % 2], (0, 4, 15)[program // 2 % 3]
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        wave = sum(np.sin(2 * np.pi * hertz * h * time) / h**power for h in range(1, 8))
        clips.append(4000 * wave * np.exp(-decay * time))
    pcm = np.stack(clips).astype(np.int16)
    program, pitch, velocity = np.array(rows).T
    return NoteSet(pcm, program, pitch, velocity, RATE)


def test_melodies():
    known = tones()
    pitches = (60, 62, 64, 65, 67)
    first = compose_melodies(known, (0, 1), pitches, 4, seconds=1.5, seed=1)
    assert first.pcm.shape == (8, 24_000)
    assert first.label.tolist() == [0] * 4 + [1] * 4
    assert first.audio().shape == (8, 24_000)
    assert torch.equal(first[3], first.audio()[3])
    again = compose_melodies(known, (1,), pitches, 4, seconds=1.5, seed=1)
    assert np.array_equal(first.pcm[4:], again.pcm)  # whatever else is composed
    other = compose_melodies(known, (1,), pitches, 4, seconds=1.5, seed=2)
    assert not np.array_equal(again.pcm, other.pcm)
    # every pitch that sounds at the start is one of those that may
    spectrum = np.abs(np.fft.rfft(first.pcm[:, :3000].astype(float), 1 << 16))
    hertz = spectrum[:, :4000].argmax(1) * RATE / (1 << 16)
    heard = np.round(69 + 12 * np.log2(hertz / 440)).astype(int)
    assert set(heard.tolist()) <= set(pitches)
    with pytest.raises(ValueError, match="silent at all pitches"):
        compose_melodies(known, (5,), pitches, 4)
    with pytest.raises(ValueError, match="samples a note"):
        compose_melodies(tones(seconds=0.5), (0,), pitches, 4)


def test_the_classifier():
    known = tones(programs=range(6))
    learned = compose_melodies(known, range(6), range(60, 72), 6, seed=0)
    asked = compose_melodies(known, range(6), range(60, 72), 3, seed=1)
    classifier = InstrumentClassifier(learned.audio(), torch.from_numpy(learned.label), RATE)
    labels = torch.from_numpy(asked.label)
    ranks = classifier.ranks(asked.audio(), labels)
    assert (ranks == 1).float().mean() > 0.6  # chance is a sixth
    assert (ranks <= 2).float().mean() > 0.9
    assert (classifier.ranks(learned.audio(), torch.from_numpy(learned.label)) == 1).all()
    assert torch.equal(
        classifier.ranks(asked.audio(), labels), classifier.ranks(0.1 * asked.audio(), labels)
    )
    assert (classifier.ranks(asked.audio(), (labels + 3) % 6) > 1).all()
    # silence has one order of instruments, whoever is asked for
    silence = classifier.ranks(torch.zeros(6, 32_000), torch.arange(6))
    assert sorted(silence.tolist()) == [1, 2, 3, 4, 5, 6]


def test_nearest_clip():
    known = compose_melodies(tones(), (0, 1), range(60, 72), 6, seed=0).audio()
    clips = torch.stack((0.2 * known[3], torch.randn(32_000)))
    replayed, noise = nearest_clip(clips, known, RATE, chunk=5).tolist()
    assert replayed == pytest.approx(0, abs=0.1)
    assert noise > 10
    expected = (log_mel(clips[1:], RATE, 40, 320) - log_mel(known, RATE, 40, 320)).square()
    assert noise == pytest.approx(expected.mean((1, 2)).sqrt().min().item(), rel=1e-3)
    with pytest.raises(ValueError, match="samples"):
        nearest_clip(clips[:, :8000], known, RATE)
    with pytest.raises(ValueError, match="at least 512"):
        log_mel(clips[:, :100], RATE)
