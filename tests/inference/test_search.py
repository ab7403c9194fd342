"""search, embed and eval as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import musiclm_fast
from musiclm_fast import cli
from musiclm_fast.inference import search_index as music_index
from musiclm_fast.inference.embedder import Embedder
from musiclm_fast.models.checkpoint import load_mulan, save_checkpoint

soundfile = pytest.importorskip("soundfile", reason="needs the train extra")
soxr = pytest.importorskip("soxr", reason="needs the train extra")
ROOT = Path(__file__).resolve().parents[2]


def save_model(path, seed=0):
    torch.manual_seed(seed)
    sizes = dict(dim=16, depth=1, heads=2, dim_head=8)
    audio = musiclm_fast.AudioSpectrogramTransformer(**sizes, front_end="mulan")
    mulan = musiclm_fast.MuLaN(audio, musiclm_fast.TextTransformer(**sizes), dim_latent=8)
    save_checkpoint(path, mulan, clip_seconds=0.5)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "mulan.pt")


def write_noise(path, seconds=1.2, rate=16000):
    seed = int.from_bytes(path.name.encode()[:4], "big")
    wav = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)).cumsum()
    soundfile.write(path, 0.5 * wav / np.abs(wav).max(), rate)


@pytest.fixture
def music(tmp_path, monkeypatch):
    """A folder of four files, one of them below it, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "music"
    (folder / "album").mkdir(parents=True)
    for name in ("a.wav", "b.flac", "album/c.ogg", "d.wav"):
        write_noise(folder / name, 0.4 + 0.5 * len(name) / 4)
    return folder


def search(capsys, folder, model, *argv, text="calm piano", status=0):
    assert cli.main(["search", str(folder), text, "--model", str(model), "--json", *argv]) == status
    out = capsys.readouterr()
    return json.loads(out.out), out.err


def embedded_by(capsys, monkeypatch):
    """The files that searches embed from now on."""
    seen = []
    plain = Embedder._read

    def read(self, sounds, index):
        seen.append(sounds.name(index))
        return plain(self, sounds, index)

    monkeypatch.setattr(Embedder, "_read", read)
    return seen


def test_search_is_the_models(music, model, capsys):
    got, err = search(capsys, music, model)
    assert "4 files (4 new)" in err
    assert (got["files"], got["new"], got["changed"], got["removed"]) == (4, 4, 0, 0)
    mulan, _ = load_mulan(model)
    with torch.no_grad():
        text = mulan.get_text_latents(raw_texts=["calm piano"])[0]
    expected = []
    for name in ("a.wav", "album/c.ogg", "b.flac", "d.wav"):
        wav = torch.from_numpy(soundfile.read(music / name, dtype="float32")[0])
        last = max(0, len(wav) - 8000)
        starts = [*range(0, last, 8000), last]
        with torch.no_grad():
            clips = torch.cat([mulan.get_audio_latents(wav[s : s + 8000][None]) for s in starts])
        near = clips @ text
        best = int(near.argmax())
        expected.append((near[best].item(), name, starts[best] / 16000))
    expected.sort(reverse=True)
    assert [m["name"] for m in got["matches"]] == [name for _, name, _ in expected]
    for match, (near, _, start) in zip(got["matches"], expected, strict=True):
        assert match["similarity"] == pytest.approx(near, abs=1e-4)
        assert match["start"] == pytest.approx(start, abs=1e-3)
        assert 0 < match["end"] - match["start"] <= 0.5 + 1e-6


def test_only_what_changed_is_embedded(music, model, capsys, monkeypatch):
    seen = embedded_by(capsys, monkeypatch)
    first, _ = search(capsys, music, model)
    assert sorted(seen) == ["a.wav", "album/c.ogg", "b.flac", "d.wav"]
    seen.clear()
    again, err = search(capsys, music, model)
    assert seen == [] and again["matches"] == first["matches"] and "new" not in err
    write_noise(music / "e.wav")
    write_noise(music / "a.wav", 2.0)
    (music / "d.wav").unlink()
    third, err = search(capsys, music, model, text="loud")
    assert sorted(seen) == ["a.wav", "e.wav"]
    assert "1 new, 1 changed, 1 removed" in err
    names = {match["name"] for match in third["matches"]}
    assert names == {"a.wav", "album/c.ogg", "b.flac", "e.wav"}
    fresh, _ = search(capsys, music, model, "--index", str(music.parent / "other"), text="loud")
    for ours, theirs in zip(third["matches"], fresh["matches"], strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["similarity"] == pytest.approx(theirs["similarity"], abs=1e-6)
    (music / "e.wav").unlink()
    seen.clear()
    last, err = search(capsys, music, model, text="loud")
    assert seen == [] and "1 removed" in err and last["files"] == 3


def test_unreadable_files_are_named_and_not_tried_again(music, model, capsys, monkeypatch):
    (music / "broken.mp3").write_bytes(b"no music")
    soundfile.write(music / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(music / "short.wav", np.ones(160) / 2, 16000)
    (music / "gone.wav").symlink_to(music / "nowhere.wav")
    got, err = search(capsys, music, model)
    assert "3 left out" in err and "broken.mp3: cannot be read as sound" in err
    assert set(got["unreadable"]) == {"broken.mp3", "silent.wav", "short.wav"}
    assert "shorter than" in got["unreadable"]["short.wav"]
    assert len(got["matches"]) == 4
    seen = embedded_by(capsys, monkeypatch)
    again, err = search(capsys, music, model)
    assert seen == [] and again["unreadable"] == got["unreadable"] and "3 left out" in err


def test_another_model_has_an_index_of_its_own(music, model, tmp_path, capsys, monkeypatch):
    other = save_model(tmp_path / "other.pt", seed=1)
    seen = embedded_by(capsys, monkeypatch)
    first, _ = search(capsys, music, model)
    second, err = search(capsys, music, other)
    assert len(seen) == 8 and "rebuilt" not in err
    assert first["matches"] != second["matches"]
    seen.clear()
    assert search(capsys, music, model)[0]["matches"] == first["matches"] and seen == []
    copy = shutil.copy(model, tmp_path / "copy.pt")
    assert search(capsys, music, copy)[0]["matches"] == first["matches"] and seen == []
    # one named file is rebuilt with a message
    index = str(tmp_path / "index")
    search(capsys, music, model, "--index", index)
    again, err = search(capsys, music, other, "--index", index)
    assert f"{index}: rebuilt, since it was made by another model" in err
    assert again["matches"] == second["matches"]
    _, err = search(capsys, music, other, "--index", index, "--stride", "0.1")
    assert "rebuilt" in err


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None])
def test_a_damaged_index_is_made_anew(music, model, tmp_path, capsys, damage):
    index = tmp_path / "index"
    first, _ = search(capsys, music, model, "--index", str(index))
    index.write_bytes(index.read_bytes()[:-50] if damage is None else damage)
    again, err = search(capsys, music, model, "--index", str(index))
    assert "rebuilt, since it is damaged" in err
    assert again["matches"] == first["matches"]


def test_an_interruption_keeps_what_is_done(music, model, capsys, monkeypatch):
    plain = Embedder._latents
    calls = []

    def stop_after_two(self, windows):
        calls.append(len(windows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, windows)

    monkeypatch.setattr(Embedder, "_latents", stop_after_two)
    argv = ["search", str(music), "calm", "--model", str(model), "--batch-size", "2"]
    assert cli.main(argv) == cli.INTERRUPTED
    assert "finished files are saved" in capsys.readouterr().err
    seen = embedded_by(capsys, monkeypatch)
    got, _ = search(capsys, music, model)
    assert 0 < len(seen) < 4 and got["kept"] == 4 - len(seen)
    assert len(got["matches"]) == 4


def test_a_kill_loses_little_and_breaks_nothing(music, model, capsys, monkeypatch):
    monkeypatch.setattr(music_index, "_SAVE_EVERY", 0.0)
    saves = []
    plain = music_index.MusicIndex.save

    def save(self):
        saves.append(len(self.sounds))
        plain(self)

    monkeypatch.setattr(music_index.MusicIndex, "save", save)
    search(capsys, music, model)
    assert saves == [1, 2, 3, 4, 4]


def test_an_index_that_cannot_be_written_only_costs_time(music, model, tmp_path, capsys):
    (tmp_path / "file").touch()
    got, err = search(capsys, music, model, "--index", str(tmp_path / "file" / "index"))
    assert "the index could not be written" in err and len(got["matches"]) == 4


def test_the_printed_answer(music, model, capsys):
    assert cli.main(["search", str(music), "calm", "-k", "2", "--model", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[0] == "1"
    assert lines[0].split()[-1] in {"a.wav", "album/c.ogg", "b.flac", "d.wav"}
    assert "0:00-0:0" in lines[0]


def test_a_name_that_is_no_text(music, model, capsys):
    shutil.copy(music / "a.wav", os.fsencode(music) + b"/\xff.wav")
    assert cli.main(["search", str(music), "calm", "--model", str(model)]) == 0
    assert "\ufffd.wav" in capsys.readouterr().out
    assert search(capsys, music, model)[0]["new"] == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (["search", "{music}", " "], "text: got ' ', expected words"),
        (["search", "{music}", "x", "-k", "0"], "-k: got 0"),
        (["search", "{music}/none", "x"], "folder: no folder"),
        (["search", "{empty}", "x"], "without sound files, expected files of aif"),
        (["search", "{broken}", "x"], "expected a sound file that can be read"),
        (["search", "{music}", "x", "--window", "-1"], "window_seconds: got -1"),
        (["search", "{music}", "x", "--model", "{music}/a.wav"], "is damaged or not a checkpoint"),
        (["embed", "{music}", "-o", "x.csv"], "expected a name in .npz or .safetensors"),
        (["embed", "{music}", "-o", "{music}/no/x.npz"], "output: no folder"),
        (["eval", "{music}"], "expected a manifest in it"),
        (["eval", "{music}", "--captions", "names", "--labels", "no.csv"], "labels: no file"),
    ],
)
def test_bad_input(music, model, tmp_path, capsys, argv, message):
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "x.mp3").write_bytes(b"no music")
    places = {name: tmp_path / name for name in ("music", "empty", "broken")}
    argv = [word.format(**places) for word in argv]
    if "--model" not in argv:
        argv += ["--model", str(model)]
    assert cli.main(argv) == cli.FAILED
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_the_missing_default_model(music, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["search", str(music), "calm"]) == cli.FAILED
    assert "`musiclm-fast demo` trains a small model" in capsys.readouterr().err


def test_embed_a_folder(music, model, tmp_path, capsys):
    for suffix in ("npz", "safetensors"):
        out = tmp_path / f"out.{suffix}"
        assert cli.main(["embed", str(music), "-o", str(out), "--model", str(model)]) == 0
    assert "4 sounds" in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as file:
        arrays = dict(file)
    assert arrays["names"].tolist() == ["a.wav", "album/c.ogg", "b.flac", "d.wav"]
    assert arrays["audio"].shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(arrays["audio"], axis=1), 1, atol=1e-6)
    for place in range(4):
        own = arrays["windows"][arrays["window_sound"] == place].mean(axis=0)
        np.testing.assert_allclose(arrays["audio"][place], own / np.linalg.norm(own), atol=1e-6)
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "out.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["names"]) == arrays["names"].tolist()
        for name in ("audio", "windows", "window_sound", "window_start"):
            assert np.array_equal(file.get_tensor(name), arrays[name])


def manifest(music):
    rows = [
        "path,caption,start",
        "a.wav,calm,",
        "b.flac,loud,0.1",
        "album/c.ogg,calm,",
        "gone.wav,x,",
    ]
    (music / "manifest.csv").write_text("\n".join(rows))
    return music


@pytest.mark.filterwarnings("ignore:source")
def test_embed_captioned_sounds(music, model, tmp_path):
    out = tmp_path / "out.npz"
    source = manifest(music)
    assert cli.main(["embed", str(source), "-o", str(out), "--model", str(model)]) == 0
    mulan, _ = load_mulan(model)
    with np.load(out) as file, torch.no_grad():
        assert file["names"].tolist() == ["a.wav", "b.flac [0.1- s]", "album/c.ogg"]
        assert file["texts"].tolist() == ["calm", "loud", "calm"]
        assert file["text_sound"].tolist() == [0, 1, 2]
        expected = mulan.get_text_latents(raw_texts=["calm", "loud", "calm"]).numpy()
        np.testing.assert_allclose(file["text"], expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:source")
def test_interrupted_evaluation(music, model, monkeypatch, capsys):
    def interrupt(self, windows):
        raise KeyboardInterrupt

    monkeypatch.setattr(Embedder, "_latents", interrupt)
    assert cli.main(["eval", str(manifest(music)), "--model", str(model)]) == cli.INTERRUPTED
    assert "stopped" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:source")
def test_eval(music, model, tmp_path, capsys):
    source = manifest(music)
    labels = tmp_path / "labels.csv"
    labels.write_text("path,labels\na.wav,calm\nb.flac,loud;calm\nalbum/c.ogg,slow\n")
    argv = ["eval", str(source), "--model", str(model), "--labels", str(labels)]
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sounds"] == 3 and report["captions"] == 2
    assert set(report["labels"]["roc_auc"]) == {"calm", "loud", "slow"}
    assert report["text_to_audio"]["recall@5"] == 1.0
    assert cli.main([*argv, "-o", str(tmp_path / "out"), "--map", "pca"]) == 0
    out = capsys.readouterr()
    assert "zero-shot over 3 labels" in out.out and "report.json" in out.err
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_windows_longer_than_the_files(music, model, capsys):
    got, _ = search(capsys, music, model, "--window", "30")
    assert got["windows"] == 4
    for match in got["matches"]:
        seconds = soundfile.info(music / match["name"]).duration
        assert (match["start"], match["end"]) == (0.0, pytest.approx(seconds))


def test_the_command_itself(music, model):
    done = subprocess.run(
        [sys.executable, "-m", "musiclm_fast", "search", music, "calm", "--model", model],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 4
