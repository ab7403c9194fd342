from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast._dispatch import BackendError
from musiclm_fast.ops import mel_filters, spectrogram
from musiclm_fast.ops.spectrogram import _cpp, _cuda, stretch_time
from musiclm_fast.ops.spectrogram.reference import num_frames, spectrogram_reference
from musiclm_fast.testing import assert_close_to_oracle, poisoned_memory
from tests.ops import cuda_resources
from tests.upstream import live

ROOT = Path(__file__).resolve().parents[2]
PAD_MODES = ("reflect", "constant", "replicate", "circular")
LENGTHS = [3000, 1999, 1300]

needs_library = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())


@pytest.fixture(scope="session")
def torchaudio() -> Any:
    """The real torchaudio, importable through the live reference's stand-ins."""
    try:
        live.load()
        return pytest.importorskip("torchaudio")
    except live.ReferenceMissing as missing:
        pytest.skip(str(missing))


def random_window(length: int) -> Tensor:
    """Not symmetric, and nowhere zero: a mistaken tap shows."""
    generator = torch.Generator().manual_seed(length)
    return torch.hann_window(length + 2, periodic=False)[1:-1] * (
        1 + 0.1 * torch.rand(length, generator=generator)
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_double(options: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }


def cotangent(wav: Tensor, options: dict[str, Any], shape: torch.Size) -> Tensor:
    """Weights of the outputs, zero where a gradient is ill-conditioned.

    The direction of a vanishing spectrum, which is the gradient of a magnitude, and the derivative
    of the logarithm of a vanishing power are as good as random in any float32 computation.
    """
    weights = torch.sin(torch.arange(shape.numel(), dtype=torch.float64)).view(shape)
    stretch = options.get("stretch_rate")
    if stretch is None and options.get("power", 2.0) == 2.0 and "log_offset" not in options:
        return weights
    plain = {k: v for k, v in in_double(options).items() if k not in ("log_offset", "mean", "std")}
    plain = {**plain, "power": 1.0, "freq_mask": None, "time_mask": None, "stretch_rate": None}
    sizes = spectrogram(wav.detach().double(), backend="torch", **plain)
    loud = (sizes > 0.1 * sizes.square().mean().sqrt()).double()
    if stretch is not None:
        loud = stretch_time(loud, stretch, loud.shape[-1])
    return weights * (loud == 1)


def check_parity(options: dict[str, Any], wav: Tensor, **given: Any) -> None:
    """Values and gradient of the C++ kernel against the float64 reference."""
    wav = wav.detach().requires_grad_()
    weights: Tensor | None = None

    def values_and_gradient(backend: str, signal: Tensor, to: dict[str, Any]) -> tuple[Tensor, ...]:
        nonlocal weights
        out = spectrogram(signal, backend=backend, **to)
        if weights is None:
            weights = cotangent(wav, options, out.shape)
        (grad,) = torch.autograd.grad(out, signal, weights.to(out))
        return out.detach(), grad

    with poisoned_memory():
        ours = values_and_gradient("cpp", wav, options)
    same_dtype = values_and_gradient("torch", wav, options)
    oracle = values_and_gradient(
        "torch", wav.detach().double().requires_grad_(), in_double(options)
    )
    for name, *three in zip(("values", "gradient"), ours, same_dtype, oracle, strict=True):
        assert_close_to_oracle(name, *three)


SIZES = {
    "reference 24 of 128": dict(n_fft=128, win_length=24, hop_length=12),
    "mulan 400 of 512": dict(n_fft=512, win_length=400, hop_length=160),
    "64": dict(n_fft=64, win_length=64, hop_length=16),
    "odd 63 of 75": dict(n_fft=75, win_length=63, hop_length=20),
    "odd 75": dict(n_fft=75, win_length=75, hop_length=31),
    "400": dict(n_fft=400, win_length=400, hop_length=100),
    "odd window 201 of 240": dict(n_fft=240, win_length=201, hop_length=77),
    "7 and 11": dict(n_fft=154, win_length=154, hop_length=45),
    "31 squared": dict(n_fft=961, win_length=901, hop_length=300),
    "prime, folded": dict(n_fft=127, win_length=63, hop_length=63),
    "hop above window": dict(n_fft=96, win_length=17, hop_length=50),
    "200 of 256": dict(n_fft=256, win_length=200, hop_length=80),
    "odd hop 1023 of 1024": dict(n_fft=1024, win_length=1023, hop_length=255),
    "2048": dict(n_fft=2048, win_length=2048, hop_length=512),
    "one": dict(n_fft=1, win_length=1, hop_length=7),
    "two": dict(n_fft=2, win_length=1, hop_length=3),
}


@needs_library
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("center", [True, False], ids=["centred", "uncentred"])
def test_cpp_sizes(simd_level: str, sizes: dict[str, int], center: bool) -> None:
    window = random_window(sizes["win_length"])
    pad = 0 if center else 9
    check_parity(dict(sizes, window=window, center=center, pad=pad), noise(2, 3001))


@needs_library
@pytest.mark.parametrize("pad_mode", PAD_MODES)
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512", "odd 75"])
def test_cpp_padding_and_power(name: str, pad_mode: str, power: float) -> None:
    sizes = SIZES[name]
    window = random_window(sizes["win_length"])
    options = dict(sizes, window=window, pad_mode=pad_mode, power=power, pad=5)
    check_parity(options, noise(2, 1500))


@needs_library
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512", "odd 75"])
@pytest.mark.parametrize("per_clip", [False, True], ids=["one rate", "rate per clip"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_cpp_stretch(simd_level: str, name: str, per_clip: bool, power: float) -> None:
    rate = torch.tensor([0.7, 1.0, 1.9]) if per_clip else 0.8
    options = dict(
        SIZES[name], window=random_window(SIZES[name]["win_length"]), stretch_rate=rate, power=power
    )
    if per_clip:
        options["lengths"] = torch.tensor(LENGTHS)
    check_parity(options, noise(3, 3000))


# Uncentred: the window of the frame after the last fits into the clip, its n_fft samples do not.
BEYOND = {
    "reference 24 of 128": dict(center=False, stretch_rate=1.3, samples=128 + 240 * 12 + 11),
    "mulan 400 of 512": dict(center=False, stretch_rate=1.3, samples=512 + 15 * 160 + 120),
}


@needs_library
@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("shorter", [False, True], ids=["whole", "lengths"])
def test_cpp_stretch_reads_silence_beyond_the_last_frame(name: str, shorter: bool) -> None:
    options = dict(SIZES[name], **BEYOND[name], window=random_window(SIZES[name]["win_length"]))
    samples = options.pop("samples")
    if shorter:
        options["lengths"] = torch.tensor([samples, samples - 5 * options["hop_length"]])
    check_parity(options, noise(2, samples + 500 if shorter else samples))


@needs_library
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512", "odd 75", "2048"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["one mask", "mask per clip"])
def test_cpp_everything_at_once(simd_level: str, name: str, per_sample: bool) -> None:
    freq = torch.tensor([[[3, 7], [9, 10]], [[0, 1], [1, 1]], [[18, 99], [5, 2]]])
    time = torch.tensor([[[0, 3]], [[2, 9]], [[1, 1]]])
    n_fft = SIZES[name]["n_fft"]
    check_parity(
        dict(
            SIZES[name], window=random_window(SIZES[name]["win_length"]),
            mel=mel_filters(16_000, n_fft, 21), log_offset=1e-6, mean=-4.0, std=3.0,
            freq_mask=freq if per_sample else freq[:1], time_mask=time if per_sample else time[:1],
            mask_value=0.5, crop=(4, 3), lengths=torch.tensor([6000, 3999, 2600]),
        ),
        noise(3, 6000),
    )  # fmt: skip


@needs_library
@pytest.mark.parametrize("samples", [1, 11, 12, 23, 24, 25, 65, 130, 1000])
@pytest.mark.parametrize("pad_mode", ["constant", "replicate"])
def test_cpp_clips_shorter_than_a_window(samples: int, pad_mode: str) -> None:
    options = dict(SIZES["reference 24 of 128"], window=random_window(24), pad_mode=pad_mode)
    check_parity(options, noise(2, samples))
    options = dict(SIZES["mulan 400 of 512"], window=random_window(400), pad_mode=pad_mode)
    check_parity(options, noise(2, samples))


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512", "2048"])
def test_cpp_a_minute(name: str) -> None:
    options = dict(SIZES[name], window=torch.hann_window(SIZES[name]["win_length"]))
    check_parity(options, noise(1, 60 * 16_000))


@needs_library
def test_cpp_strided_and_half_precision_input() -> None:
    options = dict(SIZES["mulan 400 of 512"], window=random_window(400))
    wav = noise(3000, 2).t()  # samples are 2 apart
    assert wav.stride() == (1, 2)
    expected = spectrogram(wav.contiguous(), backend="cpp", **options)
    assert torch.equal(spectrogram(wav, backend="cpp", **options), expected)
    expanded = noise(1, 3000).expand(3, -1)
    result = spectrogram(expanded, backend="cpp", **options)
    assert torch.equal(result[2], spectrogram(expanded[:1], backend="cpp", **options)[0])
    half = noise(2, 3000).bfloat16().requires_grad_()
    result = spectrogram(half, backend="cpp", **options)
    assert result.dtype == torch.float32
    assert torch.equal(result, spectrogram(half.detach().float(), backend="cpp", **options))
    result.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_library), "torch"])
def test_empty_batch(backend: str) -> None:
    wav = torch.zeros(0, 1000, requires_grad=True)
    out = spectrogram(wav, n_fft=128, hop_length=12, backend=backend, crop=(16, 16))
    assert out.shape == (0, 64, 80)
    out.sum().backward()
    assert wav.grad is not None
    assert wav.grad.shape == wav.shape


@needs_library
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512"])
def test_a_clip_in_a_padded_batch_is_that_clip_alone(name: str, backend: str) -> None:
    options = dict(SIZES[name], backend=backend, stretch_rate=0.9, log_offset=1e-3)
    wav = noise(3, 3000)
    for row, length in enumerate(LENGTHS):
        wav[row, length:] = float("nan")  # never read
    padded = spectrogram(wav, lengths=torch.tensor(LENGTHS), **options)
    for row, length in enumerate(LENGTHS):
        alone = spectrogram(wav[row : row + 1, :length], **options)[0]
        frames = alone.shape[1]
        assert frames == num_frames(length, options["n_fft"], options["hop_length"])
        assert torch.equal(padded[row, :, :frames], alone)
        assert (padded[row, :, frames:] == 0).all()


@needs_library
def test_cpp_gradient_beyond_a_clips_length_is_zero() -> None:
    wav = noise(3, 3000).requires_grad_()
    with poisoned_memory():
        out = spectrogram(wav, n_fft=512, hop_length=160, lengths=torch.tensor(LENGTHS))
        (grad,) = torch.autograd.grad(out.sum(), wav)
    for row, length in enumerate(LENGTHS):
        assert (grad[row, length:] == 0).all()
        assert (grad[row, :length] != 0).all()


@needs_library
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512"])
def test_cpp_masked_frames_are_not_computed(name: str) -> None:
    options = dict(SIZES[name], time_mask=torch.tensor([[[3, 10]]]), mask_value=-1.0)
    hop, window = options["hop_length"], options["win_length"]
    wav = noise(1, 20 * hop + 600)
    # samples that only masked frames show
    wav[:, 3 * hop + window // 2 : 9 * hop - window // 2] = float("nan")
    wav.requires_grad_()
    out = spectrogram(wav, backend="cpp", check_finite=False, **options)
    assert (out[:, :, 3:10] == -1).all()
    assert torch.isfinite(out).all()
    (grad,) = torch.autograd.grad(out.sum(), wav)
    assert torch.isfinite(grad).all()


@needs_library
def test_cpp_same_result_whatever_the_number_of_threads() -> None:
    wav = noise(3, 40_000).requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = spectrogram(wav, n_fft=512, win_length=400, hop_length=160, backend="cpp")
            results.append((out.detach(), torch.autograd.grad(out.sin().sum(), wav)[0]))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


# torchaudio


BACKENDS = pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_library), "torch"])


def check_torchaudio(
    torchaudio: Any, backend: str, wav: Tensor, power: float, center: bool, **sizes: int
) -> None:
    """Values and gradient against torchaudio's Spectrogram and both its masks, same draws."""
    chain = torch.nn.Sequential(
        torchaudio.transforms.Spectrogram(**sizes, power=power, center=center, pad=3),
        torchaudio.transforms.FrequencyMasking(20),
        torchaudio.transforms.TimeMasking(9),
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        signal = wav.to(dtype).requires_grad_()
        torch.manual_seed(7)
        out = chain.to(dtype)(signal)
        weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        weights = weights * (out.double() ** (2 - power)).detach()
        (grad,) = torch.autograd.grad(out, signal, weights.to(dtype))
        results.append((out.detach(), grad))
    masks = []
    torch.manual_seed(7)  # torchaudio draws a value, then a start
    for widest, size in ((20, results[0][0].shape[1]), (9, results[0][0].shape[2])):
        value = torch.rand(1) * widest
        start = torch.rand(1) * (size - value)
        masks.append(torch.stack((start.long(), start.long() + value.long()), -1)[None])
    signal = wav.clone().requires_grad_()
    out = spectrogram(
        signal, **sizes, power=power, center=center, pad=3, freq_mask=masks[0],
        time_mask=masks[1], backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out, signal, weights.float())
    for name, *three in zip(("values", "gradient"), (out.detach(), grad), *results, strict=True):
        assert_close_to_oracle(name, *three)


TORCHAUDIO_SIZES = {
    **{name: sizes for name, sizes in SIZES.items() if sizes["n_fft"] >= 64},
    "25 of 64, hop 13": dict(n_fft=64, win_length=25, hop_length=13),
    "65 of 65, hop 9": dict(n_fft=65, win_length=65, hop_length=9),
    "255 of 256, hop 77": dict(n_fft=256, win_length=255, hop_length=77),
    "701 of 1024, hop 151": dict(n_fft=1024, win_length=701, hop_length=151),
    "1999 of 2048, hop 501": dict(n_fft=2048, win_length=1999, hop_length=501),
}


@pytest.mark.upstream
@BACKENDS
@pytest.mark.parametrize("sizes", TORCHAUDIO_SIZES.values(), ids=TORCHAUDIO_SIZES)
def test_torchaudio_spectrogram_and_masks(
    torchaudio: Any, backend: str, sizes: dict[str, int]
) -> None:
    wav = noise(2, 4000)
    for power, center in ((2.0, True), (1.0, True), (2.0, False), (1.0, False)):
        check_torchaudio(torchaudio, backend, wav, power, center, **sizes)


@pytest.mark.upstream
@BACKENDS
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512", "2048"])
def test_torchaudio_clips_from_shorter_than_a_window(
    torchaudio: Any, backend: str, name: str
) -> None:
    sizes = SIZES[name]
    # torch reflects n_fft // 2 samples of a clip with 3 zeros at both ends: the shortest it takes
    shortest = sizes["n_fft"] // 2 + 1 - 6
    for samples in (shortest, shortest + 1, sizes["n_fft"] - 1, sizes["n_fft"], 16_001):
        check_torchaudio(torchaudio, backend, noise(2, samples), 2.0, True, **sizes)


@pytest.mark.upstream
@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512", "2048"])
def test_torchaudio_a_minute(torchaudio: Any, name: str) -> None:
    check_torchaudio(torchaudio, "cpp", noise(1, 60 * 16_000), 2.0, True, **SIZES[name])


@pytest.mark.upstream
@BACKENDS
@pytest.mark.parametrize("rate", [0.8, 1.25])
def test_torchaudio_time_stretch(torchaudio: Any, backend: str, rate: float) -> None:
    wav = noise(2, 4000)
    results = []
    for dtype in (torch.float32, torch.float64):
        stft = torchaudio.transforms.Spectrogram(512, 400, 160, power=None).to(dtype)
        stretch = torchaudio.transforms.TimeStretch(160, 257).to(dtype)
        results.append(stretch(stft(wav.to(dtype)), rate).abs().pow(2))
    ours = spectrogram(
        wav, n_fft=512, win_length=400, hop_length=160, stretch_rate=rate, backend=backend
    )
    frames = min(ours.shape[-1], results[0].shape[-1])
    assert_close_to_oracle("values", ours[..., :frames], *(r[..., :frames] for r in results))
    assert (ours[..., frames:] == 0).all()  # we keep the number of frames


@pytest.mark.upstream
@pytest.mark.parametrize(("n_fft", "bands"), [(512, 64), (512, 128), (400, 20), (75, 5)])
def test_torchaudio_mel_filters(torchaudio: Any, n_fft: int, bands: int) -> None:
    theirs = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, 30.0, 7600.0, bands, 16_000, norm=None, mel_scale="htk"
    )
    if (
        n_fft % 2 == 0
    ):  # torchaudio's bins of odd n_fft end at the Nyquist frequency, which has none
        torch.testing.assert_close(
            mel_filters(16_000, n_fft, bands, 30.0, 7600.0), theirs, atol=2e-5, rtol=0
        )
    ours = mel_filters(16_000, n_fft, bands, 30.0, 7600.0)
    assert ours.shape == theirs.shape
    assert (ours >= 0).all()
    assert (ours <= 1).all()


def test_stretch_interpolates_neighbouring_magnitudes() -> None:
    magnitudes = torch.tensor([[[0.0, 1.0, 3.0]]], dtype=torch.float64)
    slow = stretch_time(magnitudes, 0.5, 8)
    assert slow.flatten().tolist() == [0.0, 0.5, 1.0, 2.0, 3.0, 1.5, 0.0, 0.0]
    both = stretch_time(magnitudes.expand(2, -1, -1), torch.tensor([1.0, 2.0]), 3)
    assert both.flatten().tolist() == [0.0, 1.0, 3.0, 0.0, 3.0, 0.0]


# registration


@needs_library
@pytest.mark.parametrize("folded", [True, False])
def test_cpp_opcheck(folded: bool) -> None:
    wav = noise(2, 1500).requires_grad_()
    n_fft, taps = (128, 24) if folded else (240, 200)
    spans = torch.tensor([[[2, 5]], [[0, 1]]])
    options = (
        mel_filters(16_000, n_fft, 20), spans, spans, torch.tensor([1500, 900]),
        torch.tensor([0.9, 1.1], dtype=torch.float64), n_fft, 50, 3, True, 0, False, 1e-3, -1.0,
        2.0, 0.0, 4, 4,
    )  # fmt: skip
    op = torch.ops.musiclm_fast.spectrogram_forward.default
    torch.library.opcheck(op, (wav, random_window(taps), *options))
    grad = noise(*op(wav, random_window(taps), *options).shape)
    backward = torch.ops.musiclm_fast.spectrogram_backward.default
    torch.library.opcheck(backward, (grad, wav.detach(), random_window(taps), *options))


@needs_library
def test_compiles_whole_with_dynamic_lengths() -> None:
    window = torch.hann_window(24)

    def loss(wav: Tensor) -> Tensor:
        spec = spectrogram(wav, n_fft=128, hop_length=12, window=window, crop=(16, 16))
        return spec.square().sum(-1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (1000, 1733, 2500):
        wav = noise(2, samples).requires_grad_()
        (expected,) = torch.autograd.grad(loss(wav).sum(), wav)
        result = compiled(wav)
        torch.testing.assert_close(result, loss(wav))
        (grad,) = torch.autograd.grad(result.sum(), wav)
        torch.testing.assert_close(grad, expected)


@needs_library
def test_cpp_refuses_with_a_reason() -> None:
    def refuse(reason: str, wav: Tensor | None = None, **options: Any) -> None:
        wav = noise(1, 1000) if wav is None else wav
        with pytest.raises(BackendError, match=reason):
            spectrogram(wav, backend="cpp", **options)
        assert spectrogram(wav, **options).shape[0] == 1  # torch takes it

    refuse("float64", noise(1, 1000).double(), n_fft=128)
    refuse("power 1 or 2", n_fft=128, power=3.0)
    refuse("prime factor above 31", n_fft=37 * 4)
    refuse("gradients for wav only", n_fft=128, window=torch.ones(128).requires_grad_())
    assert _cpp.largest_prime_factor(1) == 1
    assert _cpp.largest_prime_factor(2 * 31 * 31) == 31


def test_cuda_says_why_it_is_not_used() -> None:
    ok, reason = _cuda.available()
    if not ok:
        assert "library" in reason
    ok, reason = _cuda.supports(noise(1, 1000), 128, torch.ones(24))
    assert not ok
    assert "cpu" in reason


@needs_library
def test_self_check_passes_a_right_kernel_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with torch.inference_mode():  # where a first call may well be
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert _cuda.self_check(cpu, dtype) is None  # the same op, with its CPU kernel
    right = _cuda._autograd.run

    def later(**arguments: Any) -> Tensor:
        return right(**{**arguments, "wav": arguments["wav"].roll(1)})

    monkeypatch.setattr(_cuda._autograd, "run", later)
    assert "values (24 of 128): error" in str(_cuda.self_check(cpu, torch.float32))


# bad input

BAD_CLIP = torch.zeros(3, 1000)
BAD_CLIP[1, 7] = torch.inf


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "wav: got a int64", dict(wav=torch.zeros(2, 1000, dtype=torch.int64))),
        (ValueError, r"wav: got a .*\(2, 2, 1000\)", dict(wav=torch.zeros(2, 2, 1000))),
        (ValueError, "wav: got 0 samples", dict(wav=torch.zeros(2, 0))),
        (ValueError, "wav: got 64 samples", dict(wav=torch.zeros(2, 64))),
        (ValueError, "NaN or infinity in clip 1", dict(wav=BAD_CLIP)),
        (ValueError, "n_fft: got 0", dict(n_fft=0)),
        (ValueError, "hop_length: got 0", dict(hop_length=0)),
        (ValueError, "win_length: got 0", dict(win_length=0)),
        (ValueError, "win_length: got 129", dict(win_length=129)),
        (ValueError, "pad_mode: got 'mirror'", dict(pad_mode="mirror")),
        (ValueError, "pad: got -1", dict(pad=-1)),
        (ValueError, "power: got 0", dict(power=0)),
        (ValueError, "std: got 0", dict(std=0.0)),
        (ValueError, "stretch_rate: got -1", dict(stretch_rate=-1.0)),
        (ValueError, "stretch_rate: got", dict(stretch_rate=torch.tensor([1.0, 0.0]))),
        (ValueError, "stretch_rate: got", dict(stretch_rate=torch.ones(3))),
        (ValueError, "lengths: got 1001 of clip 1", dict(lengths=torch.tensor([1000, 1001]))),
        (ValueError, "lengths: got 64 of clip 0", dict(lengths=torch.tensor([64, 1000]))),
        (TypeError, "lengths: got a int32", dict(lengths=torch.tensor([9, 9], dtype=torch.int32))),
        (ValueError, "mel: got", dict(mel=torch.zeros(64, 8))),
        (ValueError, "freq_mask: got", dict(freq_mask=torch.zeros(3, 1, 2, dtype=torch.int64))),
        (ValueError, r"crop\[0\]: got 0", dict(crop=(0, 1))),
        (ValueError, r"at least crop\[1\] = 500 frames", dict(crop=(1, 500))),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict(wav=noise(2, 1000), n_fft=128, hop_length=12)
    with pytest.raises(error, match=match):
        spectrogram(**{**arguments, **changes})


def test_finite_but_huge_samples_are_no_error() -> None:
    wav = torch.full((1, 200), 3e38)
    assert spectrogram(wav, n_fft=16).isinf().any()


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("f_max: got 9000", (16_000, 512, 64, 0.0, 9000.0)),
        ("f_min: got 500", (16_000, 512, 64, 500.0, 400.0)),
        ("f_min: got -1", (16_000, 512, 64, -1.0)),
        ("n_mels: got 0", (16_000, 512, 0)),
    ],
)
def test_bad_mel_filters(match: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=match):
        mel_filters(*arguments)


# memory


@needs_library
@pytest.mark.parametrize("name", ["reference 24 of 128", "mulan 400 of 512"])
def test_extra_memory_is_a_tenth_of_the_output(name: str) -> None:
    from benchmarks.bench_spectrogram import memory, output_bytes
    from benchmarks.harness import in_fresh_process

    n_fft = SIZES[name]["n_fft"]
    assert in_fresh_process(memory, "ours", n_fft) <= 1.1 * output_bytes(n_fft)


# the GPU benchmark, on the CPU: does every line of it run?


@needs_library
@pytest.mark.upstream
def test_gpu_benchmark_runs(torchaudio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_spectrogram_gpu as bench
    from benchmarks.harness import Settings

    settings = Settings("gpu", "cpu", tiny=True)
    found = bench.results(settings)
    assert len({result.case for result in found}) == 6
    always = {"ours", "copy", "torchaudio", "torch"}
    assert {r.contender for r in found} == always | {"nnAudio", "flashmel"}
    assert all(r.seconds and not r.reason for r in found if r.contender in always)
    assert all(bool(r.seconds) != bool(r.reason) for r in found)
    assert bench.results(Settings()) == []

    def wrong(wav: Tensor, backend: str, **options: Any) -> Tensor:
        return spectrogram(wav, backend=backend, **options) * (1.001 if backend == "cpp" else 1.0)

    monkeypatch.setattr(bench, "spectrogram", wrong)
    found = bench.measure(128, "values", settings, "cpp")
    assert "parity check failed: values: error" in found[0].reason
    assert not any(result.seconds for result in found)


# the CUDA blocks, run on the CPU (see spectrogram_blocks.cpp)


class Case(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in (
            "wav", "window", "mel", "grad", "lengths", "freq_spans", "time_spans", "rates")),
        *((n, ctypes.c_int64) for n in (
            "clips", "samples", "n_fft", "taps", "hop", "pad", "center", "mode", "magnitude",
            "bands", "rate_step", "freq_count", "freq_step", "time_count", "time_step",
            "logarithm", "out_bands", "out_frames", "tile_frames", "segment", "threads")),
        *((n, ctypes.c_double) for n in ("log_offset", "mean", "scale", "mask_value")),
        ("out", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("blocks") / "blocks.so"
    sources = ["tests/ops/spectrogram_blocks.cpp", "csrc/spectrogram/plan.cpp"]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Icsrc", "-o", str(library)]
    subprocess.run([compiler, *flags, *sources], cwd=ROOT, check=True)
    return ctypes.CDLL(str(library))


def run_blocks(
    blocks: ctypes.CDLL, wav: Tensor, grad: Tensor | None, shape: torch.Size, **options: Any
) -> Tensor:
    """What the CUDA kernels compute: the forward pass, or the gradient for ``grad``."""
    defaults = dict(
        pad=0, center=True, pad_mode="reflect", power=2.0, stretch_rate=None, mel=None,
        log_offset=None, mean=0.0, std=1.0, freq_mask=None, time_mask=None, mask_value=0.0,
        lengths=None, crop=(1, 1),
    )  # fmt: skip
    o = {**defaults, **options}
    rates = o["stretch_rate"]
    if rates is not None:
        rates = torch.as_tensor(rates, dtype=torch.float64).reshape(-1)
    tensors = dict(
        wav=wav, window=o["window"], mel=o["mel"], grad=grad, lengths=o["lengths"], rates=rates,
        freq_spans=o["freq_mask"], time_spans=o["time_mask"],
    )  # fmt: skip
    tensors = {k: None if t is None else t.detach().contiguous() for k, t in tensors.items()}
    out = torch.full(wav.shape if grad is not None else shape, float("nan"))

    def step(spans: Tensor | None) -> tuple[int, int]:
        count = 0 if spans is None else spans.shape[1]
        return count, 2 * count if spans is not None and spans.shape[0] > 1 else 0

    (freq_count, freq_step), (time_count, time_step) = step(o["freq_mask"]), step(o["time_mask"])
    case = Case(
        **{k: None if t is None else t.data_ptr() for k, t in tensors.items()},
        clips=wav.shape[0], samples=wav.shape[1], n_fft=o["n_fft"], taps=len(o["window"]),
        hop=o["hop_length"], pad=o["pad"], center=o["center"],
        mode=PAD_MODES.index(o["pad_mode"]), magnitude=o["power"] == 1.0,
        bands=o["n_fft"] // 2 + 1 if o["mel"] is None else o["mel"].shape[1],
        rate_step=rates is not None and len(rates) > 1, freq_count=freq_count,
        freq_step=freq_step, time_count=time_count, time_step=time_step,
        logarithm=o["log_offset"] is not None, out_bands=shape[1], out_frames=shape[2],
        tile_frames=32, segment=700, threads=1, log_offset=o["log_offset"] or 0.0, mean=o["mean"],
        scale=1.0 / o["std"], mask_value=o["mask_value"], out=out.data_ptr(),
    )  # fmt: skip
    (blocks.forward if grad is None else blocks.backward)(ctypes.byref(case))
    return out


# one more, whose table moves to shared memory in parts
BLOCK_SIZES = SIZES | {"63 of 1024": dict(n_fft=1024, win_length=63, hop_length=40)}
BLOCK_CASES: dict[str, dict[str, Any]] = {
    **{name: dict(sizes) for name, sizes in BLOCK_SIZES.items()},
    **{
        f"{name}, {what}": dict(BLOCK_SIZES[name], **more)
        for name in (
            "reference 24 of 128", "mulan 400 of 512", "odd 75", "odd 63 of 75", "200 of 256",
            "odd hop 1023 of 1024", "7 and 11", "63 of 1024",
        )
        for what, more in {
            "uncentred": dict(center=False, pad=7),
            "magnitude, circular": dict(power=1.0, pad_mode="circular"),
            "replicate": dict(pad_mode="replicate", pad=3),
            "stretched": dict(stretch_rate=0.8),
            "uncentred, stretched": dict(
                center=False, stretch_rate=1.3, lengths=torch.tensor(LENGTHS)
            ),
            "stretched per clip": dict(
                stretch_rate=torch.tensor([0.7, 1.0, 1.9]), power=1.0, lengths=torch.tensor(LENGTHS)
            ),
            "log-mel": dict(
                bands=17, log_offset=1e-6, mean=-4.0, std=3.0, mask_value=0.5, crop=(4, 3),
                freq_mask=torch.tensor([[[3, 7], [9, 10]]]), lengths=torch.tensor(LENGTHS),
                time_mask=torch.tensor([[[0, 3]], [[2, 9]], [[1, 1]]]),
            ),
            "log-mel stretched": dict(bands=17, log_offset=1e-6, stretch_rate=1.2),
        }.items()
    },
}  # fmt: skip


def block_options(name: str) -> dict[str, Any]:
    """A case's arguments of the op."""
    case = BLOCK_CASES[name]
    options = {k: v for k, v in case.items() if k not in ("bands", "win_length")}
    options["window"] = random_window(case["win_length"])
    if "bands" in case:
        options["mel"] = mel_filters(16_000, case["n_fft"], case["bands"])
    return options


@pytest.mark.parametrize("name", BLOCK_CASES)
def test_cuda_blocks_on_the_cpu(blocks: ctypes.CDLL, name: str) -> None:
    options = block_options(name)
    wav = noise(3, LENGTHS[0])
    signals = [wav.requires_grad_(), wav.detach().double().requires_grad_()]
    same_dtype = spectrogram_reference(signals[0], **options)
    oracle = spectrogram_reference(signals[1], **in_double(options))
    values = run_blocks(blocks, wav, None, oracle.shape, **options)
    assert_close_to_oracle("values", values, same_dtype, oracle)
    weights = cotangent(wav, options, oracle.shape)
    gradients = [
        torch.autograd.grad(out, signal, weights.to(out))[0]
        for out, signal in zip((same_dtype, oracle), signals, strict=True)
    ]
    ours = run_blocks(blocks, wav, weights.float(), oracle.shape, **options)
    assert_close_to_oracle("gradient", ours, *gradients)


@pytest.mark.slow
def test_cuda_blocks_have_their_barriers(tmp_path: Path) -> None:
    """64 real threads under the thread sanitizer: same results as one thread, and no race."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path / "race_check"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-DRACE_CHECK", "-Icsrc"]
    sources = ["tests/ops/spectrogram_blocks.cpp", "csrc/spectrogram/plan.cpp"]
    subprocess.run(["g++", *flags, *sources, "-o", str(program)], cwd=ROOT, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_cuda_file_keeps_spectra_in_registers(tmp_path: Path, target: str) -> None:
    """No stack, no spills, and no access whose address space is decided as it runs."""
    pytest.importorskip("triton", reason="its cuobjdump reads the object file")
    if cuda_resources.nvcc() is None:
        pytest.skip("no nvcc")
    usage = cuda_resources.spectrogram_usage(target, tmp_path)
    assert len(usage) == 42
    assert all(kernel["shared"] > 0 for name, kernel in usage.items() if "ward" in name)
    for kind in ("STACK", "LOCAL", "local", "generic"):
        used = {name for name, kernel in usage.items() if kernel.get(kind, 0) > 0}
        assert not used, (kind, used)


# a CUDA device


@pytest.fixture
def cuda_kernels(gpu: str) -> None:
    ok, reason = _cuda.available()
    if not ok:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_self_check(dtype: torch.dtype, cuda_kernels: None) -> None:
    assert _cuda.self_check(torch.device("cuda"), dtype) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCK_CASES)
def test_cuda_values_and_gradients(name: str, cuda_kernels: None) -> None:
    options = block_options(name)
    wav = noise(3, LENGTHS[0])
    weights: Tensor | None = None
    results = []
    for to, backend in (("cuda", "cuda"), ("cpu", "torch"), ("double", "torch")):
        moved = in_double(options) if to == "double" else options
        device = "cuda" if to == "cuda" else "cpu"
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        signal = wav.to(device, torch.float64 if to == "double" else torch.float32).requires_grad_()
        with poisoned_memory():
            out = spectrogram(signal, backend=backend, **moved)
        if weights is None:
            weights = cotangent(wav, options, out.shape)
        with poisoned_memory():
            (grad,) = torch.autograd.grad(out, signal, weights.to(out))
        results.append((out.detach().cpu(), grad.cpu()))
    for name, *three in zip(("values", "gradient"), *results, strict=True):
        assert_close_to_oracle(name, *three)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "reference 24 of 128", "mulan 400 of 512", "mulan 400 of 512, log-mel", "odd 75",
        "reference 24 of 128, stretched", "mulan 400 of 512, stretched per clip",
    ],
)  # fmt: skip
def test_bits_of_200_cuda_runs(name: str, cuda_kernels: None) -> None:
    """Folded and fast transforms, with and without a stretch: nothing is added atomically."""
    options = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in block_options(name).items()}
    wav = noise(3, LENGTHS[0]).cuda().requires_grad_()
    first: list[Tensor] = []
    for run in range(200):
        out = spectrogram(wav, backend="cuda", **options)
        found = [out, *torch.autograd.grad(out, wav, torch.ones_like(out))]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), run
