"""SoftmaxContrastiveLearning and SigmoidContrastiveLearning against upstream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast.testing import assert_close_to_oracle
from tests.upstream import live
from tests.upstream.comparing import compare

LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("SoftmaxContrastiveLearning", {}),
    "decoupled": ("SoftmaxContrastiveLearning", dict(decoupled_contrastive_learning=True)),
    "sigmoid": ("SigmoidContrastiveLearning", {}),
}
SHAPES = [(2, 8), (1, 5, 8), (3, 2, 16), (2, 33, 7), (4, 64, 128)]  # ((layers,) batch, dim)

losses = pytest.mark.parametrize("loss", LOSSES)


def latents(shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=-1)


def make(loss: str, shape: tuple[int, ...], **arguments: Any) -> live.Pair:
    name, config = LOSSES[loss]
    layers = shape[0] if len(shape) == 3 else 1
    return live.pair(lambda package: getattr(package, name)(layers=layers, **config, **arguments))


def outputs(model: nn.Module, audio: Tensor, text: Tensor) -> dict[str, Tensor]:
    return {"loss": model(audio, text)}


@losses
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(loss: str, shape: tuple[int, ...]):
    pair = make(loss, shape)
    compare(pair, outputs, dict(audio=latents(shape, 1), text=latents(shape, 2)))


@losses
def test_pairs_that_match(loss: str):
    audio = latents((16, 32), 1)
    compare(make(loss, (16, 32)), outputs, dict(audio=audio, text=audio.clone()))


@losses
@pytest.mark.parametrize("init_temp", [1, 40])
def test_initial_temperature(loss: str, init_temp: float):
    pair = make(loss, (9, 8), init_temp=init_temp)
    compare(pair, outputs, dict(audio=latents((9, 8), 1), text=latents((9, 8), 2)))


def test_initial_bias_of_the_sigmoid_loss():
    pair = make("sigmoid", (2, 9, 8), init_bias=-3)
    compare(pair, outputs, dict(audio=latents((2, 9, 8), 1), text=latents((2, 9, 8), 2)))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_single_pair(loss: str):
    compare(make(loss, (1, 8)), outputs, dict(audio=latents((1, 8), 1), text=latents((1, 8), 2)))


@pytest.mark.parametrize("loss", ["softmax", "decoupled"])
def test_finite_where_upstream_overflows(loss: str):
    # exp(temperature * similarity) leaves float32 at 89, and below 1e-20 upstream clamps
    # it; in float64 and with positive similarities its formula is exact up to 709
    pair = make(loss, (6, 8), init_temp=200)
    audio = latents((6, 8), 1).abs()
    assert not pair.upstream(audio, audio).isfinite()

    exact = [t.double().requires_grad_() for t in (audio, audio.roll(1, 0))]
    given = [t.detach().float().requires_grad_() for t in exact]
    wanted, found = pair.oracle()(*exact), pair.ours(*given)
    wanted.backward()
    found.backward()
    # the best float32 can do is the yardstick, its floor is that of the logits (up to 200)
    assert_close_to_oracle("loss", found, wanted.float(), wanted, floor_ulps=200)
    for name, ours, oracle in zip(("audio", "text"), given, exact, strict=True):
        rounded = oracle.grad.float()
        assert_close_to_oracle(
            f"gradient of {name}", ours.grad, rounded, oracle.grad, floor_ulps=200
        )
