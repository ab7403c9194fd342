"""Checkpoints travel both ways between upstream and musiclm_fast."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import musiclm_fast
from tests.upstream import live
from tests.upstream.test_parity_audio import build as build_audio
from tests.upstream.test_parity_conditioning import build as build_quantizer
from tests.upstream.test_parity_mulan import CONFIGS
from tests.upstream.test_parity_mulan import build as build_mulan
from tests.upstream.test_parity_text import build as build_text


def build_softmax(package: ModuleType) -> nn.Module:
    return package.SoftmaxContrastiveLearning(layers=3)


def build_sigmoid(package: ModuleType) -> nn.Module:
    return package.SigmoidContrastiveLearning(layers=2)


BUILDERS: dict[str, Any] = {
    "audio": build_audio,
    "audio, n_fft 512": lambda package: build_audio(package, spec_n_fft=512, spec_win_length=400),
    "audio, other patches": lambda package: build_audio(package, patch_size=(8, 4)),
    "text": build_text,
    "softmax": build_softmax,
    "sigmoid": build_sigmoid,
    "quantizer": build_quantizer,
    **{
        f"mulan, {name}": lambda package, config=config: build_mulan(package, **config)
        for name, config in CONFIGS.items()
    },
}
every_model = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@every_model
def test_from_upstream_and_back(build: Any):
    pair = live.pair(build)
    assert_same_state(pair.ours.state_dict(), pair.upstream.state_dict())

    torch.manual_seed(99)
    ours, theirs = build(musiclm_fast), build(live.load().musiclm)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(ours.state_dict(), theirs.state_dict())


@every_model
def test_parameters_come_in_the_same_order(build: Any):
    # an optimizer's checkpoint knows parameters by their place only
    pair = live.pair(build)
    ours, theirs = (dict(model.named_parameters()) for model in (pair.ours, pair.upstream))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        assert ours[name].requires_grad == value.requires_grad


@every_model
def test_files(build: Any, tmp_path: Path):
    pair = live.pair(build)
    torch.save(pair.upstream.state_dict(), tmp_path / "theirs.pt")
    ours = build(musiclm_fast)
    ours.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=True))
    assert_same_state(ours.state_dict(), pair.upstream.state_dict())

    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    theirs = build(live.load().musiclm)
    theirs.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    assert_same_state(ours.state_dict(), theirs.state_dict())


@every_model
def test_the_same_seed_gives_the_same_initial_weights(build: Any):
    states = []
    for package in (musiclm_fast, live.load().musiclm):
        torch.manual_seed(5)
        states.append(build(package).state_dict())
    assert_same_state(*states)


def test_front_end_buffers():
    state = build_audio(musiclm_fast).state_dict()
    assert state["spec.window"].shape == (24,)
    assert state["aug.0.phase_advance"].shape == (201, 1)


def test_adam_goes_on_from_upstreams_state(tmp_path: Path):
    pair = live.pair(build_text)
    ids = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(1))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()

    theirs = torch.optim.Adam(pair.upstream.parameters(), lr=1e-2)
    step(pair.upstream, theirs)
    torch.save((pair.upstream.state_dict(), theirs.state_dict()), tmp_path / "both.pt")

    model, optimizer = torch.load(tmp_path / "both.pt", weights_only=True)
    pair.ours.load_state_dict(model)
    ours = torch.optim.Adam(pair.ours.parameters(), lr=1e-2)
    ours.load_state_dict(optimizer)
    step(pair.upstream, theirs)
    step(pair.ours, ours)
    for name, value in pair.upstream.state_dict().items():
        torch.testing.assert_close(pair.ours.state_dict()[name], value)
