"""The loss modules: the learned temperature's cap, and what they hand to the op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast import AudioSpectrogramTransformer, MuLaN, TextTransformer, testing
from musiclm_fast.models.losses import (
    MultiLayerContrastiveLoss,
    SigmoidContrastiveLearning,
    SoftmaxContrastiveLearning,
)
from musiclm_fast.ops import contrastive_loss


def latents(batch: int = 9, layers: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, layers, batch, 8, generator=generator)
    return F.normalize(a, dim=-1), F.normalize(b, dim=-1)


@pytest.mark.parametrize("module", [SoftmaxContrastiveLearning, SigmoidContrastiveLearning])
def test_the_cap_holds_and_lets_the_temperature_back_down(module: Any) -> None:
    audio, text = latents()
    capped = module(layers=2, init_temp=200.0, max_temperature=100.0)
    at_cap = module(layers=2, init_temp=100.0)
    torch.testing.assert_close(capped(audio, text), at_cap(audio, text))
    # Unrelated pairs: the loss falls with the temperature, so the gradient leads down, and flows.
    capped(audio, text).backward()
    at_cap(audio, text).backward()
    assert (at_cap.temperatures.grad > 0).all()
    torch.testing.assert_close(capped.temperatures.grad, at_cap.temperatures.grad)


def test_the_cap_stops_what_leads_further_up() -> None:
    audio, _ = latents()
    capped = SoftmaxContrastiveLearning(layers=2, init_temp=3.0, max_temperature=2.0)
    capped(audio, audio).backward()  # perfect pairs: a higher temperature would lower the loss
    assert torch.equal(capped.temperatures.grad, torch.zeros(2, 1, 1))
    free = SoftmaxContrastiveLearning(layers=2, init_temp=1.5, max_temperature=2.0)
    free(audio, audio).backward()
    assert (free.temperatures.grad < 0).all()


def test_off_by_default_and_not_in_the_state_dict() -> None:
    audio, text = latents()
    module = SoftmaxContrastiveLearning(layers=2, init_temp=math.exp(7))
    expected = contrastive_loss(audio, text, torch.full((2,), math.exp(7)))
    torch.testing.assert_close(module(audio, text), expected)
    assert set(module.state_dict()) == {"temperatures"}
    assert set(SigmoidContrastiveLearning().state_dict()) == {"temperatures", "bias"}


@pytest.mark.parametrize("kind", ["softmax", "decoupled", "sigmoid"])
def test_labels_reach_the_op(kind: str) -> None:
    audio, text = latents()
    labels = testing.contrastive_labels(9)
    module: Any
    if kind == "sigmoid":
        module = SigmoidContrastiveLearning(layers=2)
    else:
        module = SoftmaxContrastiveLearning(
            layers=2, decoupled_contrastive_learning=kind == "decoupled"
        )
    bias = torch.full((2,), -10.0) if kind == "sigmoid" else None
    arguments = (audio, text, torch.full((2,), 10.0), bias)
    for given in (labels, labels[0]):
        expected = contrastive_loss(*arguments, kind=kind, labels=given)
        torch.testing.assert_close(module(audio, text, labels=given), expected)
        assert abs(expected - contrastive_loss(*arguments, kind=kind)) > 0.1


def test_labels_reach_the_losses_of_all_layers() -> None:
    torch.manual_seed(0)
    module = MultiLayerContrastiveLoss(audio_dim=8, text_dim=8, dim_latent=4, layers=2)
    layers = dict(audio_layers=torch.randn(2, 9, 3, 8), text_layers=torch.randn(2, 9, 4, 8))
    labels = testing.contrastive_labels(9)
    expected = module.contrast(*module.latents(**layers), labels=labels)
    assert torch.equal(module(**layers, labels=labels), expected)
    assert abs(module(**layers) - expected) > 0.1


def test_labels_of_mulan() -> None:
    """Two captions of one clip among four pairs, with the hierarchical loss."""
    torch.manual_seed(0)
    size = dict(dim=32, depth=3, heads=2, dim_head=16)
    towers = [
        AudioSpectrogramTransformer(**size, spec_n_fft=64, spec_win_length=24),
        TextTransformer(num_tokens=50, **size),
    ]
    mulan = MuLaN(*towers, hierarchical_contrastive_loss=True).eval()
    wavs, texts = torch.randn(3, 1500)[[0, 0, 1, 2]], torch.randint(1, 50, (4, 7))
    labels = torch.tensor([0, 0, 1, 2])
    loss = mulan(wavs, texts, labels=labels)
    parts, parameters = mulan(wavs, texts, return_loss_latents=True)
    found = mulan.loss_of_latents(*parts, parameters=parameters, labels=labels)
    torch.testing.assert_close(found, loss)
    expected = mulan.contrast(*parts[:2], labels=labels)
    expected = expected + mulan.multi_layer_contrastive_learning.contrast(*parts[2:], labels=labels)
    torch.testing.assert_close(loss, expected)
    assert abs(mulan(wavs, texts) - loss) > 1e-3
    for flag in ("latents", "similarities", "pairwise_similarities", "loss_latents"):
        with pytest.raises(ValueError, match="labels"):
            mulan(wavs, texts, labels=labels, **{f"return_{flag}": True})
    mulan.audio.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran before the check"))
    with pytest.raises(ValueError, match="labels"):
        mulan(wavs, texts, labels=labels[:3])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(layers=0), "layers"),
        (dict(init_temp=0), "init_temp"),
        (dict(max_temperature=-1.0), "max_temperature"),
        (dict(strategy="gossip"), "strategy"),
    ],
)
def test_bad_options(change: dict[str, Any], word: str) -> None:
    for module in (SoftmaxContrastiveLearning, SigmoidContrastiveLearning):
        with pytest.raises(ValueError, match=word):
            module(**change)


def test_mulan_hands_cap_and_strategy_to_all_its_losses() -> None:
    size = dict(dim=32, depth=3, heads=2, dim_head=16)
    towers = [AudioSpectrogramTransformer(**size), TextTransformer(num_tokens=50, **size)]
    mulan = MuLaN(
        *towers, hierarchical_contrastive_loss=True, max_temperature=100.0, loss_strategy="ring"
    )
    losses = [m for m in mulan.modules() if isinstance(m, SoftmaxContrastiveLearning)]
    assert [(m.max_temperature, m.strategy) for m in losses] == [(100.0, "ring")] * 2
    plain = MuLaN(*towers)
    assert (plain.contrast.max_temperature, plain.contrast.strategy) == (None, "all_gather")
    with pytest.raises(ValueError, match="strategy"):
        MuLaN(*towers, loss_strategy="gossip")
