"""MuLaNEmbedQuantizer and MusicLM against upstream: codes, embeddings, codebooks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import musiclm_fast
from tests.upstream import live
from tests.upstream.comparing import compare
from tests.upstream.test_parity_mulan import AUDIO, TEXT

NAMESPACES = ("semantic", "coarse", "fine")


def build(package: ModuleType, num_tokens: int = 50, **config: Any) -> nn.Module:
    mulan = package.MuLaN(
        package.AudioSpectrogramTransformer(**AUDIO),
        package.TextTransformer(**{**TEXT, "num_tokens": num_tokens}),
    )
    defaults = dict(conditioning_dims=(16, 24, 8), rq_num_quantizers=3, codebook_size=7)
    return package.MuLaNEmbedQuantizer(mulan=mulan, **{**defaults, **config})


def waves(batch: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1200, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(1, 50, (batch, 9), generator=torch.Generator().manual_seed(seed))


def trained_pair(**config: Any) -> live.Pair:
    """Equal quantizers with codebooks from k-means on a batch, in evaluation."""
    pair = live.pair(lambda package: build(package, **config))
    pair.upstream(wavs=waves(40))
    pair.ours.load_state_dict(pair.upstream.state_dict())
    pair.upstream.eval()
    pair.ours.eval()
    return pair


@pytest.mark.parametrize("modality", ["wavs", "texts"])
@pytest.mark.parametrize("namespace", [*NAMESPACES, None])
def test_embeddings_of_a_namespace(modality: str, namespace: str | None):
    pair = trained_pair()

    def call(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
        return {"embeddings": model(**inputs, namespace=namespace)}

    # embeddings are entries of a table: one wrong code and they differ by far
    inputs = dict(wavs=waves(seed=1)) if modality == "wavs" else dict(texts=ids(seed=1))
    compare(pair, call, inputs)


def test_codes_are_all_used_and_equal():
    pair = trained_pair()
    ours, theirs = (model(wavs=waves(30, seed=2)) for model in (pair.ours, pair.upstream))
    assert torch.equal(ours, theirs)
    assert len(ours[:, 0].unique(dim=0)) > 1


def test_default_namespace_can_be_set():
    pair = trained_pair()
    for model in (pair.ours, pair.upstream):
        model.set_default_namespace("fine")
    ours, theirs = (model(wavs=waves()) for model in (pair.ours, pair.upstream))
    assert ours.shape == (12, 3, 8)
    assert torch.equal(ours, theirs)


def test_own_namespaces():
    pair = trained_pair(conditioning_dims=(4, 5), namespaces=("melody", "rhythm"))
    for namespace in ("melody", "rhythm"):
        ours, theirs = (m(texts=ids(), namespace=namespace) for m in (pair.ours, pair.upstream))
        assert torch.equal(ours, theirs)


def test_documented_shapes(upstream: live.Upstream):
    pair = live.pair(
        lambda package: build(
            package, conditioning_dims=(1024,) * 3, rq_num_quantizers=8, codebook_size=1024
        )
    )
    for namespace in NAMESPACES:
        for model in (pair.ours, pair.upstream):
            assert model(wavs=waves(2), namespace=namespace).shape == (2, 8, 1024)


def test_only_the_embeddings_are_parameters():
    pair = live.pair(build)
    shapes = [[p.shape for p in model.parameters()] for model in (pair.ours, pair.upstream)]
    assert shapes[0] == shapes[1] == [(3, 7, 16), (3, 7, 24), (3, 7, 8)]


def test_mulan_is_evaluated_in_training_too():
    pair = trained_pair()
    for model in (pair.ours, pair.upstream):
        model.train()
        model.rq.eval()
    ours, theirs = (model(wavs=waves()) for model in (pair.ours, pair.upstream))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("start", ["from k-means", "from a trained state"])
def test_codebooks_move_alike_in_training(start: str):
    pair = trained_pair() if start == "from a trained state" else live.pair(build)
    for model in (pair.ours, pair.upstream):
        model.train()
        torch.manual_seed(11)
        for step in range(4):
            model(wavs=waves(seed=step))
    ours, theirs = pair.ours.state_dict(), pair.upstream.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, n=name: f"{n}: {text}")


def stub_audio_lm(audio_lm: type[nn.Module]) -> nn.Module:
    """An AudioLM that returns noise, which depends on the conditioning and on the generator."""

    class Stub(audio_lm):  # upstream takes nothing but an AudioLM
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.audio_conditioner = None
            self.calls: list[dict[str, Any]] = []

        def forward(self, *, text_embeds: Tensor, **options: Any) -> Tensor:
            self.calls.append({"text_embeds": text_embeds, **options})
            loudness = 1 + text_embeds.mean().abs()
            return loudness * torch.randn(text_embeds.shape[0], 1200)

    return Stub()


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_musiclm_returns_the_same_sample(upstream: live.Upstream, num_samples: int):
    pair = trained_pair(num_tokens=49_408)
    returned, calls = [], []
    for package, quantizer in ((upstream.musiclm, pair.upstream), (musiclm_fast, pair.ours)):
        audio_lm = stub_audio_lm(upstream.audiolm.AudioLM)
        musiclm = package.MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer)
        torch.manual_seed(3)
        returned.append(musiclm("a slow waltz", num_samples=num_samples, max_length=7))
        calls.append(audio_lm.calls)
        assert not musiclm.training

    assert torch.equal(*returned)
    assert len(calls[0]) == len(calls[1]) == num_samples
    for theirs, ours in zip(*calls, strict=True):
        assert theirs["max_length"] == ours["max_length"] == 7
        assert torch.equal(theirs["text_embeds"], ours["text_embeds"])
