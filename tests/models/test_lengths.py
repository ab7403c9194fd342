"""Clips of different lengths and rates: an embedding depends on its own clip alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast import AudioSpectrogramTransformer, FrontEnd, MuLaN, TextTransformer
from musiclm_fast.audio.batching import as_batch, similar_lengths
from musiclm_fast.audio.resampling import resample
from musiclm_fast.models.front_end import PRESETS, draw_masks, draw_stretch
from musiclm_fast.ops import use_backend

SMALL = dict(dim=32, depth=3, heads=2, dim_head=16)
LENGTHS = [8000, 16_000, 9000, 3100, 15_999]


def make_mulan(front_end: Any = "mulan", **arguments: Any) -> MuLaN:
    torch.manual_seed(0)
    audio = AudioSpectrogramTransformer(**SMALL, front_end=front_end)
    return MuLaN(audio, TextTransformer(**SMALL), 16, **arguments)


@pytest.fixture
def clips() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, generator=generator) for length in LENGTHS]


@pytest.fixture
def texts() -> Tensor:
    return torch.randint(1, 1000, (5, 7), generator=torch.Generator().manual_seed(2))


def padded(clips: list[Tensor], value: float = float("nan")) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=value)


@pytest.mark.parametrize("front_end", [None, "mulan", "ast"])
@pytest.mark.parametrize("spread", [0.0, 0.85], ids=["one padded batch", "groups"])
def test_a_clips_embedding_is_that_of_the_clip_alone(
    monkeypatch: pytest.MonkeyPatch, clips: list[Tensor], front_end: str | None, spread: float
) -> None:
    monkeypatch.setattr("musiclm_fast.models.audio_tower._SPREAD", spread)
    mulan = make_mulan(front_end).eval()
    alone = [mulan.get_audio_latents(clip[None], True) for clip in clips]
    lengths = torch.tensor(LENGTHS)
    for wavs, given in ((padded(clips), lengths), (padded(clips), lengths.int()), (clips, None)):
        latents, layers = mulan.get_audio_latents(wavs, True, lengths=given)
        for row, (latent, own_layers) in enumerate(alone):
            torch.testing.assert_close(latents[row], latent[0])
            own = own_layers.shape[2]
            torch.testing.assert_close(layers[:, row, :own], own_layers[:, 0])
            assert (layers[:, row, own:] == 0).all()


def test_gradients_reach_each_clip_and_no_padding(clips: list[Tensor], texts: Tensor) -> None:
    mulan = make_mulan(hierarchical_contrastive_loss=True).eval()
    wavs = padded(clips).requires_grad_()
    losses = []
    for spread in (0.0, 0.85):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("musiclm_fast.models.audio_tower._SPREAD", spread)
            loss = mulan(wavs, texts, lengths=torch.tensor(LENGTHS))
        (grad,) = torch.autograd.grad(loss, wavs)
        losses.append(loss)
        for row, length in enumerate(LENGTHS):
            assert (grad[row, length:] == 0).all()
            assert (grad[row, : length // 2] != 0).any()
    torch.testing.assert_close(losses[0], losses[1])


def test_hierarchical_loss_averages_each_clips_own_patches(
    clips: list[Tensor], texts: Tensor
) -> None:
    mulan = make_mulan(hierarchical_contrastive_loss=True).eval()
    audio, text = mulan(clips, texts, return_latents=True)
    layers = torch.stack(
        [
            mulan.audio(clip[None], return_all_layers=True)[1][mulan.audio_layers_indices].mean(2)
            for clip in clips
        ],
        dim=2,
    )[:, 0]  # (layers, B, dim)
    _, text_layers = mulan.get_text_latents(texts, None, True)
    expected = mulan.contrast(audio, text) + mulan.multi_layer_contrastive_learning(
        audio_layers=layers[:, :, None], text_layers=text_layers[mulan.text_layers_indices]
    )
    torch.testing.assert_close(mulan(clips, texts), expected)


@pytest.mark.parametrize("front_end", [None, "mulan"])
def test_training_step(clips: list[Tensor], texts: Tensor, front_end: str | None) -> None:
    mulan = make_mulan(front_end).train()
    loss = mulan(clips, texts)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mulan.parameters())
    _, _, tokens = mulan.audio(clips, return_all_layers=True)
    height = mulan.audio.front_end.bands // 16
    own = [height * (mulan.audio.spec.frames(length) // 16) for length in LENGTHS]
    assert tokens.tolist() == [int(n * 0.75) for n in own]


def test_equal_lengths_are_an_ordinary_batch(clips: list[Tensor]) -> None:
    mulan = make_mulan().eval()
    equal = [clip[:3000] for clip in clips]
    assert torch.equal(mulan.get_audio_latents(equal), mulan.get_audio_latents(torch.stack(equal)))
    mulan.train()
    results = []
    for lengths in (None, torch.full((5,), 3000)):
        torch.manual_seed(3)
        results.append(mulan.get_audio_latents(torch.stack(equal), lengths=lengths))
    torch.testing.assert_close(*results)  # the same masks and the same dropped patches


def test_spectrograms_of_different_lengths() -> None:
    tower = AudioSpectrogramTransformer(**SMALL, accept_spec=True).eval()
    specs = torch.randn(2, 100, 32)
    out = tower(specs, lengths=torch.tensor([100, 37]))
    torch.testing.assert_close(out[1], tower(specs[1:, :37])[0])
    with pytest.raises(ValueError, match="lengths: got 101 of clip 0, expected 1 to 100"):
        tower(specs, lengths=torch.tensor([101, 37]))
    with pytest.raises(ValueError, match="lists are for waveforms"):
        tower(list(specs))
    with pytest.raises(ValueError, match="input_sample_hz"):
        tower(specs, input_sample_hz=8000)


def test_compiles_with_lengths(clips: list[Tensor]) -> None:
    tower = AudioSpectrogramTransformer(**{**SMALL, "depth": 1}, front_end="mulan").eval()
    compiled = torch.compile(tower, fullgraph=True, dynamic=False, backend="aot_eager")
    lengths = torch.tensor(LENGTHS)
    torch.testing.assert_close(
        compiled(padded(clips, 0.0), lengths=lengths), tower(padded(clips), lengths=lengths)
    )


def test_the_shortest_clip_makes_one_patch_and_no_shorter_one_does() -> None:
    options = dict(SMALL, patch_size=(8, 16))
    for more in (
        {}, dict(front_end="mulan"), dict(spec_center=False), dict(spec_pad=30),
        dict(spec_n_fft=1024, spec_win_length=1024, spec_hop_length=10), dict(spec_win_length=25),
    ):  # fmt: skip
        tower = AudioSpectrogramTransformer(**options, **more).eval()
        shortest = tower.shortest_clip
        assert tower(torch.randn(1, shortest)).shape == (1, 32)
        with pytest.raises(ValueError, match="samples"):
            tower(torch.randn(1, shortest - 1))


def test_no_value_is_read_back_from_the_device_to_draw_or_to_mask() -> None:
    # a meta tensor has no values: reading one raises
    meta, own = torch.device("meta"), torch.tensor([100, 40], device="meta")
    config = dataclasses.replace(PRESETS["mulan"], time_stretch=0.1)
    freq, time = draw_masks(config, 64, 100, 2, meta, own)
    assert freq.device == time.device == draw_stretch(config, 2, meta).device == meta
    assert freq.shape == time.shape == (2, 1, 2)
    tower = AudioSpectrogramTransformer(**SMALL, front_end=config)
    draws = tower.draw(torch.empty(2, 16_000, device=meta), lengths=own)
    for drawn in (draws.stretch, draws.freq_mask, draws.time_mask, draws.kept):
        assert drawn.device == meta
    assert draws.kept.shape == (2, 18)


def test_masks_per_sample_lie_within_each_clip() -> None:
    own = torch.tensor([1000, 100, 10])
    for seed in range(20):
        torch.manual_seed(seed)
        _, time = draw_masks(PRESETS["mulan"], 64, 1000, 3, torch.device("cpu"), own)
        assert (time[:, 0, 1] <= own).all()
        assert (time[:, 0, 1] - time[:, 0, 0] <= 0.15 * own).all()


def test_time_stretch_is_drawn_in_training_only(clips: list[Tensor]) -> None:
    config = dataclasses.replace(
        PRESETS["mulan"], time_stretch=0.2, freq_mask=0, time_mask=0, masks_per_sample=True
    )
    rates = draw_stretch(config, 1000, torch.device("cpu"))
    assert ((rates >= 0.8) & (rates <= 1.2)).all()
    assert rates.std() > 0.1
    assert draw_stretch(PRESETS["mulan"], 4, torch.device("cpu")) is None
    tower = AudioSpectrogramTransformer(**SMALL, front_end=config, patch_dropout_prob=0.0)
    wavs = torch.stack([clip[:3000] for clip in clips])
    plain = tower.eval()(wavs)
    torch.testing.assert_close(plain, tower.eval()(wavs))
    stretched = tower.train()(wavs)
    assert (stretched - plain).abs().max() > 1e-4
    with pytest.raises(ValueError, match="time_stretch"):
        FrontEnd(time_stretch=1.0)


# sample rates


def tone(rate: int, seconds: float = 0.5, hz: float = 440.0) -> Tensor:
    time = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * torch.pi * hz * time)


def test_input_sample_hz() -> None:
    mulan = make_mulan().eval()
    wav = tone(22_050).float()[None]
    expected = mulan.get_audio_latents(resample(wav, 22_050, 16_000))
    assert torch.equal(mulan.get_audio_latents(wav, input_sample_hz=22_050), expected)
    plain = mulan.get_audio_latents(wav)
    assert torch.equal(mulan.get_audio_latents(wav, input_sample_hz=16_000), plain)
    assert not torch.allclose(plain, expected)


@pytest.mark.parametrize("rate", [8000, 22_050, 48_000])
def test_resample(rate: int) -> None:
    changed = resample(tone(rate), rate, 16_000)
    assert changed.dtype == torch.float64
    expected = tone(16_000)[: len(changed)]
    assert abs(len(changed) - 8000) <= 1
    inner = slice(1000, -1000)  # a tone that starts and ends at once rings at its ends
    torch.testing.assert_close(changed[inner], expected[inner], atol=1e-5, rtol=0)
    pair = torch.stack([tone(rate), -tone(rate)]).float()
    both = resample(pair, rate, 16_000)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both[1], -both[0])
    torch.testing.assert_close(both[0], changed.float())
    with pytest.raises(ValueError, match="requires a gradient"):
        resample(pair.requires_grad_(), rate, 16_000)


def test_resampled_clips_of_different_lengths_are_resampled_alone(clips: list[Tensor]) -> None:
    mulan = make_mulan().eval()
    lengths = torch.tensor(LENGTHS)
    batch = mulan.get_audio_latents(padded(clips), lengths=lengths, input_sample_hz=12_000)
    for row, clip in enumerate(clips):
        alone = mulan.get_audio_latents(clip[None], input_sample_hz=12_000)
        torch.testing.assert_close(batch[row], alone[0])


def test_a_front_end_without_a_rate_cannot_change_it() -> None:
    mulan = make_mulan(None)
    with pytest.raises(ValueError, match="input_sample_hz: got 8000, expected None"):
        mulan.get_audio_latents(tone(8000).float()[None], input_sample_hz=8000)
    with pytest.raises(ValueError, match="front end without sample_hz"):
        mulan.embed_audio(tone(8000))


# embed_audio


def test_embed_audio_averages_windows() -> None:
    mulan = make_mulan()
    mulan.text.eval()  # modes are put back, module by module
    sound = torch.randn(16_000 * 4 + 123, generator=torch.Generator().manual_seed(5))
    options = dict(window_seconds=1.5, stride_seconds=1.0)
    result = mulan.embed_audio(sound, **options)
    assert torch.equal(result, mulan.embed_audio(sound, **options))
    assert mulan.training
    assert not mulan.text.training
    mulan.eval()
    starts = [0, 16_000, 32_000, len(sound) - 24_000]
    windows = torch.stack([sound[start : start + 24_000] for start in starts])
    expected = F.normalize(mulan.get_audio_latents(windows).mean(dim=0), dim=0)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(mulan.embed_audio(sound, batch_size=1, **options), expected)
    torch.testing.assert_close(
        mulan.embed_audio(sound[:5000]), mulan.get_audio_latents(sound[None, :5000])[0]
    )


def test_embed_audio_of_files(tmp_path: Any) -> None:
    soundfile = pytest.importorskip("soundfile")
    mulan = make_mulan()
    mono = tone(22_050).float().numpy()
    soundfile.write(tmp_path / "mono.wav", mono, 22_050, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([mono, mono], 1), 22_050, subtype="FLOAT")
    expected = mulan.embed_audio(tone(22_050).float(), input_sample_hz=22_050)
    torch.testing.assert_close(mulan.embed_audio(tmp_path / "mono.wav"), expected)
    torch.testing.assert_close(
        mulan.embed_audio(str(tmp_path / "stereo.wav"), mix_down=True), expected
    )
    with pytest.raises(ValueError, match=r"sound: got 2 channels in '.*stereo\.wav'"):
        mulan.embed_audio(tmp_path / "stereo.wav")
    with pytest.raises(ValueError, match="a file knows its rate"):
        mulan.embed_audio(tmp_path / "mono.wav", input_sample_hz=8000)
    with pytest.raises(FileNotFoundError):
        mulan.embed_audio(tmp_path / "none.wav")


@pytest.mark.parametrize(
    ("sound", "match"),
    [
        (torch.zeros(2, 9000), "mono, or mix_down=True"),
        (torch.zeros(0), "at least one sample"),
        (torch.zeros(9000, dtype=torch.int16), "floating-point"),
        (torch.full((9000,), torch.inf), "NaN or infinity"),
        (torch.cat([torch.zeros(5), torch.full((9000,), torch.nan)]), "sound: .* in sample 5"),
        (torch.zeros(1, 1, 9000), r"\(samples,\)"),
        (torch.zeros(1000), r"sound: got 0\.062 s, expected at least 0\.15 s"),
        (np.zeros(9000), r"sound: got a ndarray of dtype float64 and shape \(9000,\)"),
    ],
)
def test_embed_audio_refuses(sound: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make_mulan().embed_audio(sound)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(input_sample_hz=0), "input_sample_hz: got 0"),
        (dict(window_seconds=0.1), r"window_seconds: got 0\.1, expected at least 0\.15 s"),
        (dict(window_seconds=0.0), "window_seconds: got 0.0"),
        (dict(stride_seconds=-1.0), "stride_seconds: got -1.0"),
        (dict(batch_size=0), "batch_size: got 0"),
    ],
)
def test_embed_audio_refuses_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_mulan().embed_audio(torch.zeros(9000), **options)


# bad input


@pytest.mark.parametrize(
    ("wavs", "lengths", "match"),
    [
        ([], None, "at least one clip"),
        ([torch.zeros(2, 9000)], None, r"wavs\[0\]: got .*stereo"),
        ([torch.zeros(9000), torch.zeros(9000, dtype=torch.int16)], None, r"wavs\[1\]"),
        ([torch.zeros(9000), torch.zeros(0)], None, "lengths: got 0 of clip 1"),
        ([torch.zeros(9000), torch.zeros(300)], None, "300 of clip 1, 2 frames"),
        ([torch.zeros(9000)], torch.tensor([9000]), "lengths: .*None beside a list"),
        (torch.zeros(2, 9000), torch.tensor([9000]), r"lengths: .*\(B,\)"),
        (torch.zeros(2, 9000), torch.tensor([9000, 9001]), "9001 of clip 1"),
        (torch.zeros(2, 9000), torch.tensor([9000.0, 8000.0]), "dtype int64 or int32"),
        ([torch.zeros(9000), torch.full((8000,), torch.nan)], None, "NaN or infinity in clip 1"),
    ],
)
def test_bad_lengths(wavs: Any, lengths: Tensor | None, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make_mulan().get_audio_latents(wavs, lengths=lengths)


def test_nan_in_a_spectrogram_counts_within_lengths_only() -> None:
    tower = AudioSpectrogramTransformer(**SMALL, accept_spec=True).eval()
    specs = torch.randn(2, 100, 32)
    specs[1, 60:] = torch.nan
    out = tower(specs, lengths=torch.tensor([100, 60]))
    torch.testing.assert_close(out[1], tower(specs[1:, :60])[0])
    with pytest.raises(ValueError, match="x: got NaN or infinity in clip 1"):
        tower(specs, lengths=torch.tensor([100, 61]))
    with pytest.raises(ValueError, match="x: got NaN or infinity in clip 1"):
        tower(specs)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("sample_hz: got 0", dict(sample_hz=0)),
        ("hop_length: got 0", dict(hop_length=0)),
        ("win_length: got 129, expected at most n_fft = 128", dict(win_length=129)),
        ("pad: got -1", dict(pad=-1)),
        ("pad_mode: got 'mirror'", dict(pad_mode="mirror")),
        ("power: got 0", dict(power=0)),
        ("log_offset: got 0.0", dict(log_offset=0.0)),
        ("sample_hz: got None", dict(n_mels=8)),
        ("n_mels: got 0", dict(n_mels=0, sample_hz=16_000)),
        ("f_max: got 8001.0, .*Nyquist", dict(n_mels=8, sample_hz=16_000, f_max=8001.0)),
        ("f_min: got -1.0", dict(n_mels=8, sample_hz=16_000, f_min=-1.0)),
        ("time_mask: got 1.0", dict(time_mask=1.0)),
    ],
)
def test_bad_front_end(match: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        FrontEnd(**options)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("spec_hop_length: got 0", dict(spec_hop_length=0)),
        ("spec_pad_mode: got 'mirror'", dict(spec_pad_mode="mirror")),
        ("spec_aug_freq_mask: got -1", dict(spec_aug_freq_mask=-1)),
        ("patch_size: got 0", dict(patch_size=(16, 0))),
    ],
)
def test_bad_tower_arguments_are_named_as_the_tower_names_them(
    match: str, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=match):
        AudioSpectrogramTransformer(**SMALL, **options)


def test_similar_lengths() -> None:
    groups = similar_lengths([10, 100, 9, 90, 50], 0.85)
    assert groups == [[1, 3], [4], [0, 2]]
    assert similar_lengths([3, 1, 2], 0.0) == [[0, 2, 1]]
    assert similar_lengths([], 0.5) == []


def test_as_batch_keeps_lengths_on_the_cpu() -> None:
    batch, lengths = as_batch([torch.ones(3), torch.ones(5)])
    assert batch.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert lengths.tolist() == [3, 5]
    with use_backend("torch"):
        assert as_batch([torch.ones(3)] * 2)[1] is None
