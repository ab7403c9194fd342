"""MuLaN against upstream: every loss, latents and similarities, with all gradients."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.upstream import live
from tests.upstream.comparing import AUDIO_LAYERS, compare

AUDIO = dict(dim=32, depth=2, heads=2, dim_head=16)
TEXT = dict(dim=32, depth=2, heads=2, dim_head=16, num_tokens=50, max_seq_len=24)

DEEP = dict(audio=dict(depth=4), text=dict(depth=3))
HIERARCHICAL = dict(hierarchical_contrastive_loss=True)

# name: arguments besides the small towers'; audio and text are those of the towers
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "softmax": dict(decoupled_contrastive_learning=False),
    "sigmoid": dict(sigmoid_contrastive_loss=True),
    "towers of unequal width and depth": dict(audio=dict(dim=64, depth=3), text=dict(dim=36)),
    "48 latents": dict(dim_latent=48),
    "no patch dropout": dict(audio=dict(patch_dropout_prob=0.0)),
    "spectrograms": dict(audio=dict(accept_spec=True)),
    "hierarchical": dict(**DEEP, **HIERARCHICAL),
    "hierarchical, softmax": dict(**DEEP, **HIERARCHICAL, decoupled_contrastive_learning=False),
    "hierarchical, sigmoid": dict(**DEEP, **HIERARCHICAL, sigmoid_contrastive_loss=True),
    "hierarchical, depth 2": HIERARCHICAL,
    "hierarchical, one layer": dict(**DEEP, **HIERARCHICAL, hierarchical_contrastive_loss_layers=1),
    "hierarchical, unequal towers": dict(
        audio=dict(depth=5, dim=48), text=dict(depth=3), dim_latent=24, **HIERARCHICAL
    ),
    "hierarchical, text deeper": dict(
        audio=dict(depth=3),
        text=dict(depth=5),
        hierarchical_contrastive_loss_layers=2,
        **HIERARCHICAL,
    ),
}


def build(package: ModuleType, audio: Any = (), text: Any = (), **config: Any) -> nn.Module:
    audio_tower = package.AudioSpectrogramTransformer(**{**AUDIO, **dict(audio)})
    text_tower = package.TextTransformer(**{**TEXT, **dict(text)})
    return package.MuLaN(audio_tower, text_tower, **config)


def batch(size: int = 4, spectrograms: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    shape = (size, 60, 65) if spectrograms else (size, 1200)
    texts = torch.randint(1, 50, (size, 9), generator=generator)
    texts[1, 4:] = 0
    return dict(wavs=torch.randn(shape, generator=generator), texts=texts)


def loss(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    return {"loss": model(**inputs)}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients(config: dict[str, Any], train: bool):
    pair = live.pair(lambda package: build(package, **config))
    spectrograms = "accept_spec" in config.get("audio", {})
    compare(pair, loss, batch(spectrograms=spectrograms), train=train)


@pytest.mark.parametrize("size", [2, 7])
def test_batch_sizes(size: int):
    compare(live.pair(build), loss, batch(size), train=True)


def test_raw_texts():
    pair = live.pair(lambda package: build(package, text=dict(num_tokens=49_408)))
    texts = ["a piano", "solo violin, très lent", "drums & bass"]
    compare(pair, loss, dict(wavs=batch(3)["wavs"], raw_texts=texts))


def test_positional_arguments():
    inputs = batch()
    compare(live.pair(build), lambda m, wavs, texts: {"loss": m(wavs, texts)}, inputs)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "wanted", ["return_latents", "return_similarities", "return_pairwise_similarities"]
)
def test_instead_of_the_loss(wanted: str, train: bool):
    def call(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
        found = model(**inputs, **{wanted: True})
        found = found if isinstance(found, tuple) else (found,)
        return {f"{wanted} {i}": part for i, part in enumerate(found)}

    compare(live.pair(build), call, batch(), train=train)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_latents_and_layers(train: bool):
    def call(model: nn.Module, wavs: Tensor, texts: Tensor) -> dict[str, Tensor]:
        audio, audio_layers = model.get_audio_latents(wavs, return_all_layers=True)
        text, text_layers = model.get_text_latents(texts, return_all_layers=True)
        return {
            "audio latents": audio,
            AUDIO_LAYERS: audio_layers,
            "text latents": text,
            "text layers": text_layers,
        }

    pair = live.pair(lambda package: build(package, **DEEP))
    compare(pair, call, batch(), train=train)


def test_latents_alone():
    def call(model: nn.Module, wavs: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {"audio": model.get_audio_latents(wavs), "text": model.get_text_latents(texts)}

    compare(live.pair(build), call, batch())


def test_text_latents_of_raw_texts():
    pair = live.pair(lambda package: build(package, text=dict(num_tokens=49_408)))
    texts = ["a piano", "", "solo violin, très lent"]

    def call(model: nn.Module, texts: list[str]) -> dict[str, Tensor]:
        return {"text": model.get_text_latents(raw_texts=texts)}

    compare(pair, call, dict(texts=texts))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_depth_one_works_here_and_crashes_there(train: bool):
    shallow = live.pair(lambda package: build(package, audio=dict(depth=1), text=dict(depth=1)))
    with pytest.raises(RuntimeError, match="non-empty"):
        shallow.upstream(**batch())

    # with a second layer that adds nothing, upstream shows what one layer should give
    two_layers = live.pair(build).upstream
    two_layers.load_state_dict(shallow.upstream.state_dict(), strict=False)
    for tower in (two_layers.audio, two_layers.text):
        attention, feed_forward = tower.transformer.layers[1].requires_grad_(False)
        nn.init.zeros_(attention.to_out[0].weight)
        nn.init.zeros_(feed_forward[-1].weight)
    compare(live.Pair(two_layers, shallow.ours), loss, batch(), train=train)
