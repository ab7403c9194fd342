"""MuLaN.save_pretrained and from_pretrained: folders, repositories, damage."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch

import musiclm_fast
from musiclm_fast import MuLaN
from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast.models.checkpoint import load_mulan
from musiclm_fast.models.configuration import mulan_config


def make(dim: int = 16, **options) -> MuLaN:
    torch.manual_seed(dim)
    sizes = dict(dim=dim, depth=2, heads=2, dim_head=8)
    audio = musiclm_fast.AudioSpectrogramTransformer(
        **sizes, patch_size=(64, 16), front_end="mulan"
    )
    text = musiclm_fast.TextTransformer(**sizes, num_tokens=40, max_seq_len=8)
    return MuLaN(audio, text, dim_latent=8, **options)


@pytest.mark.parametrize("options", [{}, dict(hierarchical_contrastive_loss=True)])
def test_round_trip(options: dict[str, bool], tmp_path: Path) -> None:
    model = make(**options)
    model.save_pretrained(tmp_path / "new" / "model", clip_seconds=2.0)
    assert sorted(os.listdir(tmp_path / "new" / "model")) == ["config.json", "model.safetensors"]
    loaded = MuLaN.from_pretrained(tmp_path / "new" / "model")
    assert not loaded.training
    assert mulan_config(loaded) == mulan_config(model)
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, loaded.state_dict()[name]), name
    assert load_mulan(tmp_path / "new" / "model")[1] == {"clip_seconds": 2.0}


def test_tied_weights(tmp_path: Path) -> None:
    model = make()
    model.text.transformer.layers[1] = model.text.transformer.layers[0]
    model.save_pretrained(tmp_path)
    loaded = MuLaN.from_pretrained(tmp_path)
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, loaded.state_dict()[name]), name


def test_other_files_stay_and_permissions_are_usual(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    make().save_pretrained(tmp_path)
    make(24).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "notes"]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert MuLaN.from_pretrained(tmp_path).audio.dim == 24


def test_a_failed_write_keeps_the_earlier_model(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="disk full"):
            make(24).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub downloads is read; a local folder of the name goes first."""
    hub = pytest.importorskip("huggingface_hub")
    model = make()
    model.save_pretrained(tmp_path / "cache")
    asked = []

    def download(name: str, file: str, revision: str | None, local_files_only: bool) -> str:
        asked.append((name, file, revision, local_files_only))
        return str(tmp_path / "cache" / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    MuLaN.from_pretrained("someone/a-mulan", revision="v1", local_files_only=True)
    assert asked == [
        ("someone/a-mulan", "config.json", "v1", True),
        ("someone/a-mulan", "model.safetensors", "v1", True),
    ]
    model.save_pretrained("someone/a-mulan")
    MuLaN.from_pretrained("someone/a-mulan")
    assert len(asked) == 2


def test_a_repository_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no folder 'someone/none', and no such model"):
        MuLaN.from_pretrained("someone/none", local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"name: no folder '\./none/of/them'"):
        MuLaN.from_pretrained("./none/of/them")


def test_a_runs_folder_points_to_its_checkpoints(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "best")
    with pytest.raises(FileNotFoundError, match=r"no file .*config\.json.*there is one in .*best"):
        MuLaN.from_pretrained(tmp_path)


def alter(folder: Path, **changes) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), r"config\.json' is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "is not of musiclm_fast"),
        (lambda f: alter(f, library="other"), "is not of musiclm_fast"),
        (lambda f: alter(f, format=9), "is not of format 2"),
        (lambda f: alter(f, model=3), "does not say how to build one"),
        (lambda f: alter(f, model={"audio": {}}), "config: "),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), r"safetensors' is damaged"),
        (lambda f: make(24).save_pretrained(f / "b") or os.replace(f / "b/model.safetensors",
         f / "model.safetensors"), "another architecture"),
    ],
)  # fmt: skip
def test_damage(damage, message: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        MuLaN.from_pretrained(tmp_path)


def test_single_files_are_load_mulans(tmp_path: Path) -> None:
    (tmp_path / "mulan.pt").touch()
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        MuLaN.from_pretrained(tmp_path / "mulan.pt")
    with pytest.raises(ValueError, match="extra: got model"):
        make().save_pretrained(tmp_path, model=1)
