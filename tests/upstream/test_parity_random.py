"""Configurations nobody thought of, drawn by hypothesis, against upstream."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.upstream import live
from tests.upstream.comparing import AUDIO_LAYERS, compare

quick = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)

attention = {
    "depth": st.integers(2, 3),
    "heads": st.integers(1, 4),
    "dim_head": st.integers(1, 20),
    "ff_mult": st.integers(1, 4),
}
patch = st.integers(1, 24)
audio_towers = st.fixed_dictionaries(
    {"dim": st.integers(2, 12).map(lambda n: 4 * n), "patch_size": st.tuples(patch, patch)}
    | attention,
    optional={
        "spec_n_fft": st.integers(8, 150),
        "spec_win_length": st.integers(1, 150),
        "spec_hop_length": st.integers(1, 60),
        "spec_pad": st.integers(0, 40),
        "spec_center": st.booleans(),
        "spec_pad_mode": st.sampled_from(["reflect", "constant", "replicate", "circular"]),
        "spec_power": st.sampled_from([1, 2, 1.7]),
        "spec_aug_freq_mask": st.integers(0, 200),
        "spec_aug_time_mask": st.integers(0, 200),
        "patch_dropout_prob": st.just(0.0) | st.floats(0.01, 0.99),
    },
)
text_towers = st.fixed_dictionaries(
    {"dim": st.integers(2, 48), "num_tokens": st.just(40), "max_seq_len": st.just(20)} | attention,
    optional={"pad_id": st.integers(0, 39)},
)


def patches(tower: dict[str, Any], samples: int) -> int:
    """How many patches the tower makes of a clip; 0 where the spectrogram cannot be taken."""
    n_fft = tower.get("spec_n_fft", 128)
    window = tower.get("spec_win_length", 24)
    hop = tower.get("spec_hop_length", window // 2)
    longest = samples + 2 * tower.get("spec_pad", 0)
    if hop < 1 or window > n_fft or longest <= n_fft:
        return 0
    frames = (longest + n_fft * tower.get("spec_center", True) - n_fft) // hop + 1
    height, width = tower["patch_size"]
    return (n_fft // 2 + 1) // height * (frames // width)


@quick
@given(
    tower=audio_towers,
    batch=st.integers(1, 4),
    samples=st.integers(1, 1500),
    train=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_audio_towers(tower: dict[str, Any], batch: int, samples: int, train: bool, seed: int):
    assume(1 <= patches(tower, samples) <= 150)
    pair = live.pair(lambda package: package.AudioSpectrogramTransformer(**tower), seed=seed)
    wave = torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))

    def call(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        pooled, layers = model(x, return_all_layers=True)
        return {"output": pooled, AUDIO_LAYERS: layers}

    compare(pair, call, {"x": wave}, train=train, seed=seed)


@quick
@given(
    tower=text_towers,
    batch=st.integers(1, 4),
    length=st.integers(1, 20),
    train=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_text_towers(tower: dict[str, Any], batch: int, length: int, train: bool, seed: int):
    pair = live.pair(lambda package: package.TextTransformer(**tower), seed=seed)
    ids = torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))

    def call(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        cls, layers = model(x, return_all_layers=True)
        return {"output": cls, "text layers": layers}

    compare(pair, call, {"x": ids}, train=train, seed=seed)


@quick
@given(data=st.data(), train=st.booleans(), seed=st.integers(0, 2**31))
def test_mulans(data: st.DataObject, train: bool, seed: int):
    audio, text = data.draw(audio_towers, "audio"), data.draw(text_towers, "text")
    samples = data.draw(st.integers(200, 1200), "samples")
    assume(1 <= patches(audio, samples) <= 100)
    layers = data.draw(st.integers(1, min(audio["depth"], text["depth"]) - 1), "layers")
    config = {
        # A unit vector of one number is its sign: no gradient passes, and what is left is noise.
        "dim_latent": data.draw(st.integers(2, 40), "dim_latent"),
        "decoupled_contrastive_learning": data.draw(st.booleans(), "decoupled"),
        "sigmoid_contrastive_loss": data.draw(st.booleans(), "sigmoid"),
        "hierarchical_contrastive_loss": data.draw(st.booleans(), "hierarchical"),
        "hierarchical_contrastive_loss_layers": layers,
    }
    batch = data.draw(st.integers(2, 6), "batch")

    def build(package: Any) -> nn.Module:
        towers = package.AudioSpectrogramTransformer(**audio), package.TextTransformer(**text)
        return package.MuLaN(*towers, **config)

    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "wavs": torch.randn(batch, samples, generator=generator),
        "texts": torch.randint(0, 40, (batch, 9), generator=generator),
    }
    pair = live.pair(build, seed=seed)
    compare(pair, lambda m, **given: {"loss": m(**given)}, inputs, train=train, seed=seed)
