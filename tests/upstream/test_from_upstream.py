"""``musiclm_fast.from_upstream`` turns any live model of upstream into ours."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import musiclm_fast
from tests.upstream import live
from tests.upstream.test_parity_audio import CONFIGS as AUDIO_CONFIGS
from tests.upstream.test_parity_audio import build as build_audio
from tests.upstream.test_parity_audio import noise
from tests.upstream.test_parity_conditioning import stub_audio_lm, trained_pair, waves
from tests.upstream.test_parity_mulan import CONFIGS as MULAN_CONFIGS
from tests.upstream.test_parity_mulan import batch
from tests.upstream.test_parity_mulan import build as build_mulan
from tests.upstream.test_parity_text import CONFIGS as TEXT_CONFIGS
from tests.upstream.test_parity_text import build as build_text
from tests.upstream.test_parity_text import tokens

DROPOUTS = dict(attn_dropout=0.1, ff_dropout=0.2, patch_dropout_prob=0.3)


def assert_equal_models(built: nn.Module, converted: nn.Module, *inputs: Tensor) -> None:
    """Same class and weights, and the same results and random draws in both modes."""
    assert type(converted) is type(built)
    ours, theirs = converted.state_dict(), built.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for train in (False, True):
        results = []
        for model in (built, converted):
            torch.manual_seed(4)
            results.append(model.train(train)(*inputs))
        assert torch.equal(*results)


@pytest.mark.parametrize("config", AUDIO_CONFIGS.values(), ids=AUDIO_CONFIGS)
def test_audio_towers(config: dict[str, Any]):
    pair = live.pair(lambda package: build_audio(package, **config))
    assert_equal_models(pair.ours, musiclm_fast.from_upstream(pair.upstream), noise(2, 2000))


@pytest.mark.parametrize("time_first", [True, False])
def test_audio_towers_for_spectrograms(time_first: bool):
    config = dict(accept_spec=True, accept_spec_time_first=time_first)
    pair = live.pair(lambda package: build_audio(package, **config))
    assert_equal_models(pair.ours, musiclm_fast.from_upstream(pair.upstream), noise(2, 64, 48))


@pytest.mark.parametrize("config", TEXT_CONFIGS.values(), ids=TEXT_CONFIGS)
def test_text_towers(config: dict[str, Any]):
    pair = live.pair(lambda package: build_text(package, **config))
    assert_equal_models(pair.ours, musiclm_fast.from_upstream(pair.upstream), tokens())


@pytest.mark.parametrize("config", MULAN_CONFIGS.values(), ids=MULAN_CONFIGS)
def test_mulans(config: dict[str, Any]):
    pair = live.pair(lambda package: build_mulan(package, **config))
    inputs = batch(spectrograms="accept_spec" in config.get("audio", {}))
    assert_equal_models(pair.ours, musiclm_fast.from_upstream(pair.upstream), *inputs.values())


@pytest.mark.parametrize("decoupled", [False, True])
def test_softmax_loss(decoupled: bool):
    def build(package: ModuleType) -> nn.Module:
        return package.SoftmaxContrastiveLearning(
            layers=2, decoupled_contrastive_learning=decoupled, init_temp=3
        )

    pair = live.pair(build)
    converted = musiclm_fast.from_upstream(pair.upstream)
    assert_equal_models(pair.ours, converted, noise(2, 5, 8), noise(2, 5, 8, seed=4))


def test_sigmoid_loss():
    pair = live.pair(lambda package: package.SigmoidContrastiveLearning(layers=2, init_bias=-4))
    converted = musiclm_fast.from_upstream(pair.upstream)
    assert_equal_models(pair.ours, converted, noise(2, 5, 8), noise(2, 5, 8, seed=4))


def test_quantizer():
    pair = trained_pair(conditioning_dims=(4, 5), namespaces=("melody", "rhythm"))
    pair.upstream.set_default_namespace("rhythm")
    pair.ours.set_default_namespace("rhythm")
    converted = musiclm_fast.from_upstream(pair.upstream)
    assert not converted.training
    assert torch.equal(converted(wavs=waves()), pair.ours(wavs=waves()))

    # the codebooks go on as upstream's would
    results = []
    for model in (pair.upstream, converted):
        model.train()
        torch.manual_seed(2)
        for step in range(3):
            model(wavs=waves(seed=step))
        results.append(model.rq.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_musiclm_keeps_its_audiolm(upstream: live.Upstream):
    pair = trained_pair(num_tokens=49_408)
    audio_lm = stub_audio_lm(upstream.audiolm.AudioLM)
    theirs = upstream.musiclm.MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=pair.upstream)
    ours = musiclm_fast.from_upstream(theirs)
    assert ours.audio_lm is audio_lm
    results = []
    for model in (theirs, ours):
        torch.manual_seed(8)
        results.append(model("a slow waltz", num_samples=3))
    assert torch.equal(*results)


@pytest.mark.parametrize("train", [True, False])
def test_mode_and_dropout_rates(train: bool):
    rates = {name: DROPOUTS[name] for name in ("attn_dropout", "ff_dropout")}
    pair = live.pair(lambda package: build_mulan(package, audio=DROPOUTS, text=rates))
    pair.upstream.train(train)
    pair.upstream.text.eval()  # a tower of its own mode
    converted = musiclm_fast.from_upstream(pair.upstream)
    assert converted.training == converted.audio.training == train
    assert not converted.text.training
    assert converted.audio.patch_dropout_prob == 0.3

    def rates_of(model: nn.Module) -> list[float]:
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    assert rates_of(converted) == rates_of(pair.upstream)
    assert rates_of(converted)[:3] == [0.1, 0.1, 0.2]


def test_dtype():
    pair = live.pair(build_mulan)
    converted = musiclm_fast.from_upstream(pair.oracle())
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    inputs = batch()
    loss = converted.eval()(inputs["wavs"].double(), inputs["texts"])
    exact = pair.oracle().eval()(inputs["wavs"].double(), inputs["texts"])
    assert loss.dtype == torch.float64
    # what float32 constants remain, the 2-D sine embedding's, show here
    torch.testing.assert_close(loss, exact, rtol=1e-7, atol=0)


def test_nothing_is_shared():
    pair = live.pair(build_mulan)
    converted = musiclm_fast.from_upstream(pair.upstream)
    theirs = {t.data_ptr() for t in pair.upstream.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in converted.state_dict().values()}


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="AudioSpectrogramTransformer"):
        musiclm_fast.from_upstream(nn.Linear(2, 2))
