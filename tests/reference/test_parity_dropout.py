"""Dropout against the live reference: other random numbers, the same distribution.

Attention dropout is a function of a seed and a position here, so single runs differ from the
reference's. Over many runs every output and every parameter's gradient must have the same mean
and the same spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from tests.reference import live

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


def sample(model: nn.Module, x: Tensor) -> Tensor:
    """Output and gradients of ``RUNS`` training passes, one row each."""
    model.train()
    rows = []
    for run in range(RUNS):
        torch.manual_seed(run)
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        parts = [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)  # (runs, numbers)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize(("build", "make_input"), [(audio_tower, noise), (text_tower, tokens)])
def test_same_mean_and_spread(
    build: Callable[..., nn.Module], make_input: Callable[[], Tensor], rates: dict[str, float]
):
    pair = live.pair(lambda package: build(package, **rates))
    ours, theirs = (sample(model, make_input()).double() for model in (pair.ours, pair.reference))
    assert ours.shape == theirs.shape
    moving = theirs.var(0) > 0
    assert moving.float().mean() > 0.9
    assert torch.equal(ours.var(0) > 0, moving)

    ours, theirs = ours[:, moving], theirs[:, moving]
    spread = ((ours.var(0) + theirs.var(0)) / RUNS).sqrt()
    apart = ((ours.mean(0) - theirs.mean(0)) / spread).abs()
    assert apart.max() < SIGMAS

    # the spread of all numbers together, each on its own scale
    scale = (ours.var(0) + theirs.var(0)).sqrt()
    ratio = (ours.var(0) / scale.square()).mean() / (theirs.var(0) / scale.square()).mean()
    assert abs(math.log(ratio)) < 0.2


@pytest.mark.parametrize(("build", "make_input"), [(audio_tower, noise), (text_tower, tokens)])
def test_evaluation_drops_nothing(
    build: Callable[..., nn.Module], make_input: Callable[[], Tensor]
):
    pair = live.pair(lambda package: build(package, **RATES["both"]))
    ours, theirs = (model.eval()(make_input()) for model in (pair.ours, pair.reference))
    torch.testing.assert_close(ours, theirs)
