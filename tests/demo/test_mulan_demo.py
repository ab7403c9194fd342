"""The demo in small: it learns, writes its files, and stopping changes nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from musiclm_fast.demo.mulan_demo import results_table, run_demo
from musiclm_fast.demo.mulan_run import DemoConfig, DemoRun, Notes
from musiclm_fast.evaluation.metrics import collapsed_loss
from musiclm_fast.models.checkpoint import CheckpointError, load_mulan

for package in ("tinysoundfont", "pretty_midi", "soxr", "soundfile", "matplotlib"):
    pytest.importorskip(package, reason="needs the demo extra and tinysoundfont")

SMALL = DemoConfig(
    instruments=4, steps=100, batch_size=4, dim=32, depth=1, heads=2, dim_head=16, warmup_steps=5,
    low=48, high=71, octave=60, velocities=(100,), learning_rate=3e-3, clip_seconds=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def notes(cache):
    return Notes.render(SMALL, progress=False)


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """A finished demo: (folder, results, what was said)."""
    folder, said = tmp_path_factory.mktemp("demo") / "output", []
    results = run_demo(folder, SMALL, device="cpu", say=said.append)
    return folder, results, said


def test_notes_are_split_by_pitch(notes):
    pitches = {name: set(notes.notes.pitch[at].tolist()) for name, at in notes.parts.items()}
    assert pitches["held-out octave"] == set(range(60, 72))
    assert len(pitches["held-out pitches"]) == 3
    assert set.union(*pitches.values()) == set(range(48, 72))
    assert sum(len(part) for part in pitches.values()) == 24
    assert [item.program for item in notes.instruments] == [0, 32, 64, 96]
    assert notes.label.bincount().tolist() == [24] * 4


def test_a_batch_holds_distinct_instruments(notes, tmp_path):
    run = DemoRun(SMALL, notes, tmp_path)
    wavs, texts = run.trainer.draws.draw(3)
    assert wavs.shape == (4, 8000)
    named = [
        next(i.name for i in notes.instruments if any(n in text for n in (i.name, *i.synonyms)))
        for text in texts
    ]
    assert len(set(named)) == 4
    again, same = run.trainer.draws.draw(3)
    assert torch.equal(wavs, again)
    assert texts == same
    assert not torch.equal(wavs, run.trainer.draws.draw(4)[0])


def test_it_learns_and_writes(finished):
    folder, results, said = finished
    assert results["final_loss"] < results["collapsed_loss"] - 1
    assert results["collapsed_loss"] == pytest.approx(collapsed_loss(4))
    assert results["accuracy"]["train"]["top-1"] > results["chance"] == 0.25
    assert json.loads((folder / "results.json").read_text()) == results
    for name in ("spectrograms.png", "loss.png", "similarity.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size > 10_000
    assert len(list(folder.glob("*.wav"))) == 3
    text = "\n".join(said)
    for part in ("train", "held-out pitches", "held-out octave", "chance", "ln(3) = 1.10"):
        assert part in text


def test_checkpoint_is_the_trained_model(finished, notes):
    folder, results, _ = finished
    mulan, extra = load_mulan(folder / "mulan.pt")
    assert extra["clip_seconds"] == 0.5
    assert extra["labels"] == [item.name for item in notes.instruments]
    run = DemoRun(SMALL, notes, folder)
    run.mulan.load_state_dict(mulan.state_dict())
    accuracy = run.evaluate()
    expected = results["accuracy"]["held-out octave"]["top-1"]
    assert accuracy["held-out octave"][1] == expected
    assert "held-out octave" in results_table(accuracy, notes, SMALL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_equals_never_stopped(number, notes, tmp_path, monkeypatch):
    whole = DemoRun(SMALL, notes, tmp_path / "whole")
    whole.train(until=11)

    first = DemoRun(SMALL, notes, tmp_path / "parts")
    backward = first.trainer.backward

    def interrupted(*args):
        if first.trainer.step == 6:
            os.kill(os.getpid(), number)  # in the middle of the seventh step
        return backward(*args)

    before = signal.getsignal(number)
    monkeypatch.setattr(first.trainer, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.train(until=11)
    assert signal.getsignal(number) == before
    torch.manual_seed(123)  # the state of the global generator does not matter
    second = DemoRun(SMALL, notes, tmp_path / "parts")
    assert second.trainer.step == 7
    torch.manual_seed(124)
    second.train(until=11)

    for name in ("train_loss", "held-out pitches"):
        assert second.log(name) == whole.log(name)
    assert [step for step, _ in whole.log("held-out pitches")] == [5, 10, 11]
    for name, value in whole.mulan.state_dict().items():
        assert torch.equal(value, second.mulan.state_dict()[name]), name


def test_training_leaves_the_global_generator_alone(notes, tmp_path):
    before = torch.get_rng_state()
    DemoRun(SMALL, notes, tmp_path).trainer.train_step()
    assert torch.equal(before, torch.get_rng_state())


def test_a_finished_run_is_not_trained_again(finished, capsys):
    folder, results, _ = finished
    again = run_demo(folder, SMALL, device="cpu", say=lambda line: None)
    assert again["accuracy"] == results["accuracy"]
    assert again["training_seconds"] == results["training_seconds"]
    assert "resuming at step 100 of 100" in capsys.readouterr().out


def test_another_recipe_is_not_resumed(finished, notes):
    folder, _, _ = finished
    other = DemoConfig(**{**vars(SMALL), "seed": 1})
    with pytest.raises(CheckpointError, match=r"seed = 0, not 1.*--restart"):
        DemoRun(other, notes, folder)


def test_a_damaged_state_is_refused(notes, tmp_path):
    DemoRun(SMALL, notes, tmp_path).train(until=1)
    state = tmp_path / "training" / "latest" / "trainer.pt"
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        DemoRun(SMALL, notes, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(notes, tmp_path, monkeypatch):
    run = DemoRun(SMALL, notes, tmp_path)
    run.train(until=2)
    weight = run.mulan.audio_to_latents.weight
    monkeypatch.setattr(run.mulan, "forward", lambda *args, **kwargs: weight.sum() * np.nan)
    with pytest.raises(FloatingPointError, match="step 3"):
        run.train(until=4)
    assert DemoRun(SMALL, notes, tmp_path).trainer.step == 2


@pytest.mark.parametrize(
    "wrong", [{"instruments": 1}, {"instruments": 129}, {"steps": 0}, {"batch_size": 2}]
)
def test_configuration_is_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DemoConfig(**wrong)


def test_the_learning_benchmark_trains_and_times(notes, tmp_path, monkeypatch):
    from benchmarks import bench_learning

    monkeypatch.setattr(bench_learning, "RECIPE", replace(SMALL, steps=4))
    seconds = bench_learning.step_seconds(notes, tmp_path, rounds=1)
    assert min(seconds[name] for name in bench_learning.FRONT_ENDS) > 0
    config = replace(SMALL, steps=3)
    found = bench_learning.train(config, notes, tmp_path / "run")
    assert found["checks"][-1][0] == 3 and np.isfinite(found["loss"])
    assert bench_learning.train(config, notes, tmp_path / "run") == found
