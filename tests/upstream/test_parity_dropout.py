"""Dropout against upstream: other random numbers, the same distribution.

Attention dropout is a function of a seed and a position here, so single runs
differ from upstream's. Over many samples every output must have the same mean and spread, and over
many runs every parameter's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from tests.upstream import live

COPIES = 4096  # of one clip or text: a mean that is off by a tenth of the spread shows
RUNS = 48
SIGMAS = 6.0  # 2e-9 two-sided: about 1e-4 for the 20,000 numbers compared, and the seeds are fixed

SMALL = dict(dim=16, depth=2, heads=2, dim_head=8)
RATES = {
    "attention": dict(attn_dropout=0.3),
    "feed-forward": dict(ff_dropout=0.3),
    "both": dict(attn_dropout=0.2, ff_dropout=0.1),
}


def audio_tower(package: ModuleType, **rates: float) -> nn.Module:
    quiet = dict(patch_dropout_prob=0.0, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    return package.AudioSpectrogramTransformer(**SMALL, **quiet, **rates)


def text_tower(package: ModuleType, **rates: float) -> nn.Module:
    return package.TextTransformer(**SMALL, num_tokens=30, max_seq_len=16, **rates)


def noise() -> Tensor:
    return torch.randn(4, 800, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(0, 30, (4, 12), generator=torch.Generator().manual_seed(1))


towers = pytest.mark.parametrize(
    ("build", "make_input"), [(audio_tower, noise), (text_tower, tokens)], ids=["audio", "text"]
)
rates = pytest.mark.parametrize("rates", RATES.values(), ids=RATES)


def assert_same_mean_and_spread(ours: Tensor, theirs: Tensor) -> None:
    """Both are ``(samples, numbers)``."""
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape
    error = ((ours.var(0) + theirs.var(0)) / len(ours)).sqrt()
    apart = (ours.mean(0) - theirs.mean(0)).abs() / error
    assert apart.max() < SIGMAS

    # the spread of all numbers together, each on its own scale
    both = ours.var(0) + theirs.var(0)
    ratio = (ours.var(0) / both).mean() / (theirs.var(0) / both).mean()
    assert abs(math.log(ratio)) < 0.2


@rates
@towers
@torch.no_grad()
def test_outputs(
    build: Callable[..., nn.Module], make_input: Callable[[], Tensor], rates: dict[str, float]
):
    pair = live.pair(lambda package: build(package, **rates))
    copies = make_input()[:1].repeat(COPIES // 8, 1)  # every row has dropout of its own

    def sample(model: nn.Module) -> Tensor:
        torch.manual_seed(5)
        return torch.cat([model(copies) for _ in range(8)])

    assert_same_mean_and_spread(sample(pair.ours), sample(pair.upstream))


def sample_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Gradients of all parameters in ``RUNS`` training passes, one row each."""
    rows = []
    for run in range(RUNS):
        torch.manual_seed(run)
        model.zero_grad()
        model(x).square().sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


@rates
@towers
def test_gradients(
    build: Callable[..., nn.Module], make_input: Callable[[], Tensor], rates: dict[str, float]
):
    pair = live.pair(lambda package: build(package, **rates))
    ours, theirs = (sample_gradients(model, make_input()) for model in (pair.ours, pair.upstream))
    moving = theirs.var(0) > 0  # tokens that do not occur have no gradient
    assert moving.float().mean() > 0.9
    assert torch.equal(ours.var(0) > 0, moving)
    assert_same_mean_and_spread(ours[:, moving], theirs[:, moving])


@towers
def test_evaluation_drops_nothing(
    build: Callable[..., nn.Module], make_input: Callable[[], Tensor]
):
    pair = live.pair(lambda package: build(package, **RATES["both"]))
    ours, theirs = (model.eval()(make_input()) for model in (pair.ours, pair.upstream))
    torch.testing.assert_close(ours, theirs)
