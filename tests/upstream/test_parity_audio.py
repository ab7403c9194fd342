"""AudioSpectrogramTransformer against upstream, in evaluation and in training."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.upstream import live
from tests.upstream.comparing import AUDIO_LAYERS, compare

SMALL = dict(dim=32, depth=2, heads=2, dim_head=16)

# name: arguments besides SMALL's. 2,000 samples give 65 bins x 167 frames: 4 x 10 patches.
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "dim 64, depth 3, 8 heads of 64": dict(dim=64, depth=3, heads=8, dim_head=64),
    "one head": dict(heads=1, dim_head=32),
    "3 heads of 8": dict(heads=3, dim_head=8),
    "heads of 5": dict(dim_head=5),
    "dim 36": dict(dim=36),
    "ff_mult 2": dict(ff_mult=2),
    "ff_mult 3, hidden odd": dict(ff_mult=3, dim=44),
    "patches 8 x 16": dict(patch_size=(8, 16)),
    "patches 32 x 4": dict(patch_size=(32, 4)),
    "patches 5 x 7": dict(patch_size=(5, 7)),
    "one row of patches": dict(patch_size=(65, 3)),
    "one patch": dict(patch_size=(64, 160)),
    "n_fft 64": dict(spec_n_fft=64),
    "n_fft odd": dict(spec_n_fft=101),
    "window as long as n_fft": dict(spec_win_length=128, spec_hop_length=32),
    "window and hop odd": dict(spec_win_length=25, spec_hop_length=13),
    "hop longer than the window": dict(spec_win_length=16, spec_hop_length=29, patch_size=8),
    "default hop of an odd window": dict(spec_win_length=31),
    "pad 13": dict(spec_pad=13),
    "n_fft 512, 25 ms and 10 ms": dict(
        spec_n_fft=512, spec_win_length=400, spec_hop_length=160, patch_size=(16, 6)
    ),
    "n_fft 1024, window and hop odd": dict(
        spec_n_fft=1024, spec_win_length=701, spec_hop_length=151, patch_size=(16, 6)
    ),
    "n_fft 1024, not centred": dict(
        spec_n_fft=1024,
        spec_win_length=1023,
        spec_hop_length=65,
        spec_center=False,
        patch_size=(32, 5),
    ),
    "n_fft 2048": dict(
        spec_n_fft=2048, spec_win_length=2048, spec_hop_length=333, patch_size=(64, 3)
    ),
    "not centred": dict(spec_center=False),
    "not centred, pad 50": dict(spec_center=False, spec_pad=50),
    "constant padding": dict(spec_pad_mode="constant"),
    "replicated padding": dict(spec_pad_mode="replicate"),
    "circular padding": dict(spec_pad_mode="circular"),
    "magnitude": dict(spec_power=1),
    "power 1.5": dict(spec_power=1.5),
    "power 3": dict(spec_power=3),
    "no masks": dict(spec_aug_freq_mask=0, spec_aug_time_mask=0),
    "frequency mask only": dict(spec_aug_freq_mask=20, spec_aug_time_mask=0),
    "masks longer than the axes": dict(spec_aug_freq_mask=400, spec_aug_time_mask=900),
    "another stretch factor": dict(spec_aug_stretch_factor=1.3),
    "no patch dropout": dict(patch_dropout_prob=0.0),
    "most patches dropped": dict(patch_dropout_prob=0.9),
    "all but one patch dropped": dict(patch_dropout_prob=0.99),
}

SPECTROGRAMS: dict[str, dict[str, Any]] = {
    "time first": dict(accept_spec=True),
    "frequency first": dict(accept_spec=True, accept_spec_time_first=False),
    "time first, patches 6 x 10": dict(accept_spec=True, patch_size=(6, 10)),
}


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(package: ModuleType, **config: Any) -> nn.Module:
    return package.AudioSpectrogramTransformer(**{**SMALL, **config})


def outputs(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    pooled, layers = model(x, return_all_layers=True, **options)
    return {"output": pooled, AUDIO_LAYERS: layers}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_from_audio(config: dict[str, Any], train: bool):
    pair = live.pair(lambda package: build(package, **config))
    compare(pair, outputs, dict(x=noise(3, 2000)), train=train)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", SPECTROGRAMS.values(), ids=SPECTROGRAMS)
def test_from_a_spectrogram(config: dict[str, Any], train: bool):
    pair = live.pair(lambda package: build(package, **config))
    compare(pair, outputs, dict(x=noise(2, 71, 50).square()), train=train)


@pytest.mark.parametrize("seed", range(6))
def test_training_draws_the_same_masks_and_patches(seed: int):
    pair = live.pair(build)
    compare(pair, outputs, dict(x=noise(4, 1500)), train=True, seed=seed)


@pytest.mark.parametrize("widest", [(5, 7), (20, 20), (40, 60)], ids=str)
def test_masks_of_many_seeds(widest: tuple[int, int]):
    # nothing flows back to a masked entry, so the gradient of the input shows the masks
    config = dict(dim=8, patch_size=2, accept_spec=True, patch_dropout_prob=0.0)
    config |= dict(spec_aug_freq_mask=widest[0], spec_aug_time_mask=widest[1])
    pair = live.pair(lambda package: build(package, **config))
    masks: list[list[Tensor]] = []
    for model in (pair.ours, pair.upstream):
        masks.append([])
        for seed in range(80):
            spectrogram = noise(1, 16, 16).requires_grad_()
            torch.manual_seed(seed)
            model(spectrogram).square().sum().backward()
            masks[-1].append(spectrogram.grad == 0)
    assert torch.equal(*(torch.stack(found) for found in masks))
    assert any(found.any() for found in masks[0])
    assert not all(found.all() for found in masks[0])


@pytest.mark.parametrize("seed", range(3))
def test_training_without_patch_dropout_on_request(seed: int):
    pair = live.pair(build)

    def call(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return outputs(model, x, force_no_patch_dropout=True)

    compare(pair, call, dict(x=noise(2, 1500)), train=True, seed=seed)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_output_alone(train: bool):
    pair = live.pair(build)
    compare(pair, lambda model, x: {"output": model(x)}, dict(x=noise(2, 1500)), train=train)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("samples", [193, 1999, 2304])
def test_batches_and_lengths(batch: int, samples: int):
    pair = live.pair(build)
    compare(pair, outputs, dict(x=noise(batch, samples)), train=True)


@pytest.mark.parametrize("loudness", [1e-3, 1e-2, 30.0], ids=lambda gain: f"gain {gain:g}")
def test_quiet_and_loud_audio(loudness: float):
    pair = live.pair(build)
    compare(pair, outputs, dict(x=loudness * noise(2, 1500)))


def test_silence():
    pair = live.pair(build)
    compare(pair, outputs, dict(x=torch.zeros(2, 1500)))


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_one_second_with_a_long_window(train: bool):
    config = dict(dim=128, depth=4, spec_n_fft=512, spec_win_length=400, spec_hop_length=160)
    pair = live.pair(lambda package: build(package, **config))
    compare(pair, outputs, dict(x=noise(2, 16_000)), train=train)
