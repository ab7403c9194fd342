"""Checkpoints rebuild their model, survive crashes, and never execute anything."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

import musiclm_fast
from musiclm_fast._checkpoint import CheckpointError, read_checkpoint
from musiclm_fast.models.checkpoint import load_mulan, save_checkpoint
from musiclm_fast.models.configuration import mulan_config


def small_mulan(front_end="mulan", **options):
    torch.manual_seed(0)
    sizes = dict(heads=2, dim_head=8)
    audio = musiclm_fast.AudioSpectrogramTransformer(
        16, 2, (64, 16) if front_end == "mulan" else 16, **sizes, front_end=front_end
    )
    text = musiclm_fast.TextTransformer(dim=20, depth=2, max_seq_len=32, ff_mult=2, **sizes)
    return musiclm_fast.MuLaN(audio, text, dim_latent=12, **options).eval()


CONFIGURATIONS = {
    "preset": lambda: small_mulan(),
    "upstream": lambda: small_mulan(None, sigmoid_contrastive_loss=True),
    "hierarchical": lambda: small_mulan(hierarchical_contrastive_loss=True),
    "own front end": lambda: small_mulan(
        musiclm_fast.FrontEnd(sample_hz=8000, n_fft=256, win_length=200, n_mels=32, freq_mask=0.1)
    ),
}


@pytest.mark.parametrize("build", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_round_trip(build, tmp_path):
    model = build()
    save_checkpoint(tmp_path / "new" / "model.pt", model, clip_seconds=2.0)
    loaded, extra = load_mulan(tmp_path / "new" / "model.pt")
    assert extra == {"clip_seconds": 2.0}
    assert not loaded.training
    assert mulan_config(loaded) == mulan_config(model)
    assert loaded.audio.front_end == model.audio.front_end
    for (name, ours), theirs in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    wav = torch.randn(3, 8000)
    with torch.no_grad():
        ours, theirs = (m(wav, raw_texts=["a", "b", "c"]) for m in (model, loaded))
    assert torch.equal(ours, theirs)
    assert os.listdir(tmp_path / "new") == ["model.pt"]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: no file .*none\.pt"):
        load_mulan(tmp_path / "none.pt")


@pytest.mark.parametrize("kept", [0, 10, 2000, -100])
def test_damaged_file(kept, tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(path, small_mulan())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.pt.* is damaged"):
        load_mulan(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "write", [torch.save, lambda o, path: path.write_bytes(pickle.dumps(o, 2))]
)
def test_nothing_is_executed(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"model": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_mulan(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


def altered(change):
    content = {"format": 1, "config": mulan_config(small_mulan()), "model": {}}
    content["model"] = small_mulan().state_dict()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "not a dict"),
        ({"state_dict": {}}, "no 'config' and 'model'"),
        (altered(lambda c: c.update(format=99)), "format 1"),
        (altered(lambda c: c["config"].pop("text")), "no part 'text'"),
        (altered(lambda c: c["config"]["audio"].update(wings=2)), "cannot build"),
        (altered(lambda c: c["config"]["audio"].update(dim=3)), "cannot build"),
        (altered(lambda c: c["config"]["audio"].update(dim=32)), "another architecture"),
        (altered(lambda c: c["config"]["text"].update(depth=3)), "another architecture"),
    ],
)
def test_not_our_checkpoint(content, message, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_mulan(tmp_path / "model.pt")


def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_checkpoint(path, small_mulan(), generation=1)

    def half(content, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")  # what torch says when the disk is full

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, small_mulan(), generation=2)
    monkeypatch.undo()
    assert read_checkpoint(path)["generation"] == 1
    assert os.listdir(tmp_path) == ["model.pt"]


def test_file_permissions_are_those_of_any_file(tmp_path):
    save_checkpoint(tmp_path / "model.pt", small_mulan())
    (tmp_path / "other").touch()
    assert (tmp_path / "model.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_only_our_own_classes(tmp_path):
    model = small_mulan()
    model.text = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"model\.text: got Identity"):
        save_checkpoint(tmp_path / "model.pt", model)
    with pytest.raises(TypeError, match="model: got Linear"):
        mulan_config(torch.nn.Linear(2, 2))
