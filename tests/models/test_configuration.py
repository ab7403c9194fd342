"""A configuration of plain values rebuilds a MuLaN, whatever registered towers it has."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import musiclm_fast
from musiclm_fast._checkpoint import CheckpointError
from musiclm_fast.models import towers
from musiclm_fast.models.arguments import record_arguments
from musiclm_fast.models.configuration import mulan_config
from musiclm_fast.models.towers import register_tower


class BagOfTokens(nn.Module):
    """A text tower of a user's own."""

    @record_arguments
    def __init__(self, dim, vocabulary=32):
        super().__init__()
        self.dim, self.depth = dim, 1
        self.embedding = nn.Embedding(vocabulary, dim)

    def forward(self, x=None, raw_texts=None):
        if raw_texts is not None:
            x = torch.tensor([[len(text) % 32] for text in raw_texts])
        return self.embedding(x).mean(dim=1)


@pytest.fixture
def registry(monkeypatch):
    copied = {kind: dict(known) for kind, known in towers._TOWERS.items()}
    monkeypatch.setattr(towers, "_TOWERS", copied)


def small_mulan(text=None):
    audio = musiclm_fast.AudioSpectrogramTransformer(
        16, 1, (64, 16), heads=2, dim_head=8, front_end="mulan"
    )
    if text is None:
        text = musiclm_fast.TextTransformer(dim=20, depth=1, heads=2, dim_head=8)
    return musiclm_fast.MuLaN(audio, text, dim_latent=12).eval()


def test_a_configuration_names_the_towers_classes():
    config = mulan_config(small_mulan())
    assert config["audio"]["class"] == "AudioSpectrogramTransformer"
    assert config["text"]["class"] == "TextTransformer"
    assert mulan_config(musiclm_fast.MuLaN.from_config(config)) == config


def test_a_saved_configuration_may_have_the_old_name_of_the_front_end(tmp_path):
    audio = musiclm_fast.AudioSpectrogramTransformer(
        16, 1, heads=2, dim_head=8, front_end="upstream"
    )
    text = musiclm_fast.TextTransformer(dim=20, depth=1, heads=2, dim_head=8)
    mulan = musiclm_fast.MuLaN(audio, text, dim_latent=12)
    mulan.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["model"]["audio"]["front_end"] == "upstream"
    saved["model"]["audio"]["front_end"] = "reference"
    file.write_text(json.dumps(saved))
    loaded = musiclm_fast.MuLaN.from_pretrained(tmp_path)
    assert mulan_config(loaded) == mulan_config(mulan)


def test_a_configuration_without_classes_builds_our_own_towers():
    config = mulan_config(small_mulan())
    earlier = {
        part: {name: value for name, value in arguments.items() if name != "class"}
        for part, arguments in config.items()
    }
    assert mulan_config(musiclm_fast.MuLaN.from_config(earlier)) == config


def test_a_tower_of_ones_own(registry):
    model = small_mulan(BagOfTokens(8))
    with pytest.raises(TypeError, match=r"model\.text: got BagOfTokens.*register_tower"):
        mulan_config(model)
    register_tower("text", BagOfTokens)
    config = mulan_config(model)
    assert config["text"] == {"class": "BagOfTokens", "dim": 8, "vocabulary": 32}
    built = musiclm_fast.MuLaN.from_config(config).eval()
    built.load_state_dict(model.state_dict())
    wav = torch.randn(2, 8000)
    with torch.no_grad():
        assert torch.equal(built(wav, raw_texts=["a", "bc"]), model(wav, raw_texts=["a", "bc"]))


def test_a_name_belongs_to_one_class(registry):
    register_tower("text", BagOfTokens)
    assert register_tower("text", BagOfTokens) is BagOfTokens
    other = type("BagOfTokens", (BagOfTokens,), {})
    with pytest.raises(ValueError, match="BagOfTokens is taken"):
        register_tower("text", other)
    with pytest.raises(ValueError, match="kind: got 'video'"):
        register_tower("video", other)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("text"), "no part 'text'"),
        (lambda c: c["text"].update({"class": "Linear"}), r"text\.class: got 'Linear'"),
        (lambda c: c["text"].update({"class": ["os"]}), r"text\.class: got \['os'\]"),
        (lambda c: c["text"].update(widths=3), "widths"),
        (lambda c: c["audio"].update(dim=6), "dim: got 6"),
        (lambda c: c.update(mulan=3), "cannot build the model"),
    ],
)
def test_bad_configurations(change, message):
    config = mulan_config(small_mulan())
    change(config)
    with pytest.raises(CheckpointError, match=message):
        musiclm_fast.MuLaN.from_config(config)
