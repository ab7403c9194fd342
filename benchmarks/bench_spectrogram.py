"""The spectrogram op against torchaudio's chain, 64 clips of 10 s at 16 kHz.

Traffic is the minimum: waveform read, spectrogram written. Operations are those of the transform.
Parity is checked first. Memory is that of a fresh process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast.ops import mel_filters, spectrogram, use_backend

CLIPS, SAMPLES = 64, 160_000
FRONT_ENDS: dict[int, dict[str, Any]] = {
    128: dict(n_fft=128, win_length=24, hop_length=12),
    512: dict(n_fft=512, win_length=400, hop_length=160),
}


def masks(n_fft: int, frames: int, device: str) -> tuple[Tensor, Tensor]:
    """A fifth of the bands and of the frames."""
    bands = n_fft // 2 + 1
    freq = torch.tensor([[[bands // 4, bands // 4 + bands // 5]]])
    time = torch.tensor([[[frames // 3, frames // 3 + frames // 5]]])
    return freq.to(device), time.to(device)


def ours(n_fft: int, wav: Tensor, log_mel: bool = False, backward: bool = False) -> Tensor:
    """The op with both masks; with log_mel, 64 bands of it."""
    sizes = FRONT_ENDS[n_fft]
    frames = wav.shape[1] // sizes["hop_length"] + 1
    freq, time = masks(n_fft, frames, str(wav.device))
    window = torch.hann_window(sizes["win_length"], device=wav.device)
    mel = dict(mel=mel_filters(16_000, n_fft, 64).to(wav.device), log_offset=1e-6)
    out = spectrogram(
        wav, **sizes, window=window, freq_mask=freq, time_mask=time, **(mel if log_mel else {})
    )
    return torch.autograd.grad(out.sum(), wav)[0] if backward else out


def torchaudio_chain(
    n_fft: int, wav: Tensor, log_mel: bool = False, backward: bool = False
) -> Tensor:
    """torchaudio's Spectrogram, then its mask_along_axis twice, with the same masks."""
    import torchaudio

    sizes = FRONT_ENDS[n_fft]
    frames = wav.shape[1] // sizes["hop_length"] + 1
    window = torch.hann_window(sizes["win_length"], device=wav.device)
    out = torchaudio.functional.spectrogram(
        wav, 0, window, n_fft, sizes["hop_length"], sizes["win_length"], 2.0, False
    )
    if log_mel:
        bank = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, 8000.0, 64, 16_000)
        out = (out.transpose(1, 2) @ bank.to(out)).transpose(1, 2).add(1e-6).log()
    else:
        for axis, spans in zip((1, 2), masks(n_fft, frames, str(wav.device)), strict=True):
            place = torch.arange(out.shape[axis], device=wav.device)
            inside = (place >= spans[0, 0, 0]) & (place < spans[0, 0, 1])
            out = out.masked_fill(inside[:, None] if axis == 1 else inside, 0.0)
    return torch.autograd.grad(out.sum(), wav)[0] if backward else out


CONTENDERS: dict[str, Callable[..., Tensor]] = {"ours": ours, "torchaudio": torchaudio_chain}


def operations(n_fft: int) -> float:
    """Floating-point operations of the transform of one frame, as our kernels compute it."""
    taps = FRONT_ENDS[n_fft]["win_length"]
    if taps < 64:  # folded: two sums of taps / 2 terms for every pair of bins
        return 2.0 * 2 * (taps // 2 + 1) * (n_fft // 4 + 1)
    return 2.5 * n_fft * math.log2(n_fft)


def memory(name: str, n_fft: int) -> int:
    """Extra peak memory of a call in bytes, its output included; call in a fresh process."""
    if name != "ours":
        load_torchaudio()
    run = CONTENDERS[name]
    wav = torch.randn(CLIPS, SAMPLES)
    run(n_fft, wav[:1, :4000])  # warms up
    return harness.extra_memory(lambda: lambda: run(n_fft, wav))


def output_bytes(n_fft: int) -> int:
    """Of a call of :func:`memory`."""
    return 4 * CLIPS * (n_fft // 2 + 1) * (SAMPLES // FRONT_ENDS[n_fft]["hop_length"] + 1)


def load_torchaudio() -> None:
    """Make torchaudio importable beside any build of torch."""
    from tests.upstream import live

    live.load()


def check_parity(n_fft: int, options: dict[str, bool]) -> None:
    """One clip's values, or gradient, are torchaudio's; of log-mel the op's reference's, since
    their chain has no masks after the logarithm.

    Raises:
        AssertionError: they are not.
    """
    load_torchaudio()
    wav = torch.randn(1, SAMPLES, requires_grad=options["backward"])
    if options["log_mel"]:
        with use_backend("torch"):
            expected = ours(n_fft, wav, **options)
    else:
        expected = torchaudio_chain(n_fft, wav, **options)
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(ours(n_fft, wav, **options), expected, atol=tolerance, rtol=1e-4)


def results(settings: Settings) -> list[Result]:
    """Both front ends, values and gradient; the GPU's are in bench_spectrogram_gpu."""
    if settings.mode == "gpu":
        return []
    clips = settings.pick(CLIPS, tiny=1)
    found = []
    for n_fft in FRONT_ENDS:
        for variant in settings.pick(["power", "power gradient", "log-mel"]):
            if variant == "log-mel" and n_fft == 128:
                continue
            options = dict(log_mel="log-mel" in variant, backward="gradient" in variant)
            wav = torch.randn(clips, SAMPLES, requires_grad=options["backward"])
            frames = SAMPLES // FRONT_ENDS[n_fft]["hop_length"] + 1
            bands = 64 if options["log_mel"] else n_fft // 2 + 1
            passes = 2 if options["backward"] else 1
            cost: dict[str, Any] = dict(
                operations=passes * operations(n_fft) * clips * frames,
                traffic=passes * 4.0 * clips * (SAMPLES + bands * frames),
            )
            contenders = {}
            names = dict(CONTENDERS)
            if settings.mode == "full":
                names["torchaudio (torch.compile)"] = torch.compile(torchaudio_chain)
            for name, run in names.items():
                contenders[name] = Contender(
                    functools.partial(functools.partial, run, n_fft, wav, **options),
                    memory=functools.partial(harness.in_fresh_process, memory, name, n_fft)
                    if variant == "power" and "compile" not in name
                    else None,
                    role="ours" if name == "ours" else "peer",
                    once=name != "ours" and settings.mode == "quick" and variant != "power", **cost,
                )  # fmt: skip
            window = f"window {FRONT_ENDS[n_fft]['win_length']} of {n_fft}"
            found += harness.measure(
                "spectrogram", f"{window}, {variant}, {clips} x 10 s", contenders, settings,
                check=functools.partial(check_parity, n_fft, options),
                rounds=settings.pick(3, full=5),
                headline=f"spectrogram with masks, {clips} clips of 10 s, {window}"
                if variant == "power"
                else "",
            )  # fmt: skip
    return found
