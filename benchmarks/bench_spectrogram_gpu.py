"""The spectrogram op on a GPU against a copy and other packages, 64 clips of 10 s at 16 kHz.

``python -m benchmarks.run --mode gpu spectrogram_gpu`` (part of ``make bench-gpu``) measures
values, values and gradient, and log-mel, for 24 of 128 and 400 of 512 samples, and log-mel for 400
of 400, at which flashmel's authors quote theirs. A fifth of both axes is masked:

ours              the CUDA kernels
copy              a copy of as many bytes as must be moved (waveform read, spectrogram written)
torchaudio        its spectrogram, mel filters, logarithm and masks, if it can be imported
nnAudio           the same by its convolution
flashmel          its kernel up to the mel filters, without a gradient
torch             the op's reference
torch (compiled)  the reference under torch.compile

Values and gradient are compared with the float64 reference first, a peer's values too. Masks,
window and filters are on the device beforehand, for every contender. What cannot run is listed with
the reason. Goals: 70% of the copy's bandwidth at 24 of 128, 60% at 400 of 512, and a fifth of
torchaudio's time. Runs without a network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_spectrogram as common
from benchmarks import harness, spectrogram_peers
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import testing
from musiclm_fast.ops import mel_filters, spectrogram

FRONT_ENDS = {**common.FRONT_ENDS, 400: dict(n_fft=400, win_length=400, hop_length=160)}
VARIANTS = ("values", "values and gradient", "log-mel")
REPEATS = 10  # runs timed together: one is shorter than the timer's overhead
Run = Callable[[], Any]


def options(n_fft: int, samples: int, device: str, log_mel: bool) -> dict[str, Any]:
    """Keyword arguments of the op, on the device."""
    sizes = FRONT_ENDS[n_fft]
    bands, frames = n_fft // 2 + 1, samples // sizes["hop_length"] + 1
    found = dict(sizes, window=torch.hann_window(sizes["win_length"], device=device))
    if log_mel:
        bands = 64
        found |= dict(mel=mel_filters(16_000, n_fft, bands).to(device), log_offset=1e-6)
    for name, size in (("freq_mask", bands), ("time_mask", frames)):
        span = [size // 4, size // 4 + size // 5]
        found[name] = torch.tensor([[span]], device=device)
    return found


def traffic(clips: int, samples: int, n_fft: int, variant: str) -> float:
    """Bytes that must be moved: waveform read, spectrogram written; for the gradient, both read and
    the waveform's written."""
    bands = 64 if variant == "log-mel" else n_fft // 2 + 1
    frames = samples // FRONT_ENDS[n_fft]["hop_length"] + 1
    values = clips * (samples + bands * frames)
    if "gradient" in variant:
        values += clips * (2 * samples + bands * frames)
    return 4.0 * values


def check_parity(n_fft: int, samples: int, device: str, backend: str, log_mel: bool) -> None:
    """Raise AssertionError if ours is less accurate than the same-dtype torch path."""
    wav = torch.randn(2, samples, generator=torch.Generator().manual_seed(1)).to(device)
    given = options(n_fft, samples, device, log_mel)
    found = []
    for name, dtype in (
        (backend, torch.float32),
        ("torch", torch.float32),
        ("torch", torch.float64),
    ):
        to = {
            key: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in given.items()
        }
        signal = wav.to(dtype).requires_grad_()
        out = spectrogram(signal, backend=name, **to)
        weights = torch.sin(torch.arange(out.numel(), device=device)).view(out.shape).to(dtype)
        found.append((out.detach(), *torch.autograd.grad(out, signal, weights)))
    testing.assert_close_to_oracle("values", *(f[0] for f in found))
    if not log_mel:  # the derivative of the logarithm of a faint band is noise in float32
        testing.assert_close_to_oracle("gradient", *(f[1] for f in found))


def contenders(
    wav: Tensor, n_fft: int, variant: str, backend: str, repeats: int, checked: bool = False
) -> dict[str, Contender]:
    """Name -> what is timed, ``repeats`` runs at once; peers' values checked first if asked for."""
    gpu, gradient = wav.device.type == "cuda", "gradient" in variant
    given = options(n_fft, wav.shape[1], str(wav.device), variant == "log-mel")
    with torch.no_grad():
        weights = torch.randn_like(spectrogram(wav, backend="torch", **given))
    moved = traffic(*wav.shape, n_fft, variant)

    def contender(make: Callable[[], Run], role: str = "peer") -> Contender:
        return Contender(
            lambda: functools.partial(_repeat, repeats, make()),
            memory=(lambda: harness.gpu_memory(make)) if gpu else None,
            traffic=moved, role=role,
        )  # fmt: skip

    def run(function: Callable[[Tensor], Tensor]) -> Run:
        if gradient:
            return lambda: torch.autograd.grad(function(wav), wav, weights)
        return torch.no_grad()(lambda: function(wav))

    def copy() -> Run:
        source = torch.zeros(int(moved) // 8, device=wav.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def peer(name: str) -> Run:
        if name == "flashmel" and gradient:
            raise RuntimeError("it has no gradient")
        if checked:
            spectrogram_peers.check(name, given, definition)
        return run(spectrogram_peers.PEERS[name](given))

    definition = functools.partial(spectrogram, backend="torch", check_finite=False, **given)
    ours = functools.partial(spectrogram, backend=backend, check_finite=False, **given)
    found = {
        "ours": contender(lambda: run(ours), "ours"),
        "copy": contender(copy, "bound"),
        **{name: contender(functools.partial(peer, name)) for name in spectrogram_peers.PEERS},
        "torch": contender(lambda: run(definition)),
    }
    if gpu:
        found["torch (compiled)"] = contender(lambda: run(torch.compile(definition)))
    return found


def measure(n_fft: int, variant: str, settings: Settings, backend: str = "cuda") -> list[Result]:
    """One front end, values or values and gradient."""
    device = settings.device
    clips, samples = settings.pick((common.CLIPS, common.SAMPLES), tiny=(1, 8000))
    repeats = settings.pick(REPEATS, tiny=1)
    log_mel, gradient = variant == "log-mel", "gradient" in variant
    window = f"window {FRONT_ENDS[n_fft]['win_length']} of {n_fft}"
    wav = torch.randn(clips, samples, device=device, requires_grad=gradient)
    found = harness.measure(
        "spectrogram", f"{window}, {variant}, {clips} x {samples / 16_000:g} s",
        contenders(wav, n_fft, variant, backend, repeats, checked=True), settings,
        check=lambda: check_parity(n_fft, min(samples, 16_000), device, backend, log_mel),
        rounds=7, warmup=2,
        headline=f"spectrogram with masks, {clips} clips of 10 s, {window}"
        if variant == "values" else "",
    )  # fmt: skip
    return [dataclasses.replace(r, seconds=[s / repeats for s in r.seconds]) for r in found]


def _repeat(times: int, run: Run) -> None:
    for _ in range(times):
        run()


def results(settings: Settings) -> list[Result]:
    """Every front end and variant on a GPU; on a CPU tiny ones of the C++ kernel, as a test of
    this code."""
    if settings.mode != "gpu":
        return []
    backend = "cuda" if settings.device == "cuda" else "cpp"
    return [
        result
        for n_fft in FRONT_ENDS
        for variant in (VARIANTS if n_fft != 400 else ("log-mel",))
        if n_fft != 128 or variant != "log-mel"  # 64 mel bands of 65 bins say nothing
        for result in measure(n_fft, variant, settings, backend)
    ]
