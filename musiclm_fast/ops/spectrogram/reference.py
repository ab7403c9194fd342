"""Power or log-mel spectrogram in pure torch: the definition, the fallback and the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast._dispatch import without_autocast


def num_frames(samples: int, n_fft: int, hop_length: int, pad: int = 0, center: bool = True) -> int:
    """Frames of a clip of ``samples`` samples."""
    padded = samples + 2 * pad + (n_fft // 2 * 2 if center else 0)
    return max(0, (padded - n_fft) // hop_length + 1)


def mel_filters(
    sample_hz: int, n_fft: int, n_mels: int, f_min: float = 0.0, f_max: float | None = None
) -> Tensor:
    """Triangular mel filters on the HTK scale, peak one (not normalised by area).

    ``mel = 2595 log10(1 + f / 700)``; the edges are equally spaced in mel from f_min to f_max.

    Args:
        sample_hz: sample rate in Hz.
        n_fft: length of the Fourier transform.
        n_mels: number of bands.
        f_min, f_max: lowest and highest edge in Hz; f_max None is the Nyquist frequency.

    Returns:
        ``(n_fft // 2 + 1, n_mels)`` float32.

    Raises:
        ValueError: a size below 1, or edges that are not ``0 <= f_min < f_max <= sample_hz / 2``.
    """
    check_positive_int("sample_hz", sample_hz)
    check_positive_int("n_fft", n_fft)
    check_positive_int("n_mels", n_mels)
    f_max = check_mel_edges(sample_hz, f_min, f_max)
    bins = torch.linspace(0, sample_hz / 2, n_fft // 2 + 1, dtype=torch.float64)
    low, high = (2595.0 * torch.log10(torch.tensor(1.0 + f / 700.0, dtype=torch.float64))
                 for f in (f_min, f_max))  # fmt: skip
    mels = low + (high - low) * torch.linspace(0, 1, n_mels + 2, dtype=torch.float64)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)  # (n_mels + 2,)
    width = edges.diff()  # (n_mels + 1,)
    slopes = edges[None, :] - bins[:, None]  # (n_freqs, n_mels + 2)
    rising = -slopes[:, :-2] / width[:-1]
    falling = slopes[:, 2:] / width[1:]
    return torch.minimum(rising, falling).clamp(min=0).float()


def check_mel_edges(sample_hz: int, f_min: float, f_max: float | None) -> float:
    """The upper edge of mel bands in Hz, once both edges are checked; see :func:`mel_filters`."""
    nyquist = sample_hz / 2
    f_max = nyquist if f_max is None else f_max
    if not f_max <= nyquist:
        fail("f_max", f_max, f"at most the Nyquist frequency {nyquist} Hz")
    if not 0 <= f_min < f_max:
        fail("f_min", f_min, f"at least 0 and below f_max = {f_max} Hz")
    return f_max


def stretch_time(magnitudes: Tensor, rate: float | Tensor, frames: int) -> Tensor:
    """Play a magnitude spectrogram ``rate`` times as fast, giving ``frames`` frames.

    ``out[t] = (1 - a) m[i] + a m[i + 1]`` with ``t * rate = i + a``, and zero past the end: the
    magnitudes of a phase vocoder, whose phases a magnitude does not need.

    Args:
        magnitudes: ``(B, F, T)``.
        rate: above 1 is faster, below 1 slower; or one per clip ``(B,)``.
        frames: length of the result.

    Returns:
        ``(B, F, frames)``.
    """
    total = magnitudes.shape[-1]
    rates = torch.as_tensor(rate, dtype=torch.float64, device=magnitudes.device).reshape(-1, 1)
    position = torch.arange(frames, device=magnitudes.device, dtype=torch.float64) * rates
    left = position.floor().long()  # (1 or B, frames)
    fraction = (position - left).to(magnitudes.dtype)[:, None]
    padded = F.pad(magnitudes, (0, 2))

    def at(frame: Tensor) -> Tensor:
        index = frame.clamp(max=total + 1)[:, None].expand(*magnitudes.shape[:2], frames)
        return padded.gather(-1, index)

    return torch.lerp(at(left), at(left + 1), fraction)


def span_mask(spans: Tensor, size: int) -> Tensor:
    """Positions inside spans.

    Args:
        spans: ``(..., 2)`` integer start and end (end excluded).

    Returns:
        ``(..., size)`` bool.
    """
    position = torch.arange(size, device=spans.device)
    return (position >= spans[..., :1]) & (position < spans[..., 1:])


@without_autocast
def spectrogram_reference(
    wav: Tensor,
    *,
    n_fft: int,
    hop_length: int,
    window: Tensor,
    pad: int = 0,
    center: bool = True,
    pad_mode: str = "reflect",
    power: float = 2.0,
    stretch_rate: float | Tensor | None = None,
    mel: Tensor | None = None,
    log_offset: float | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    freq_mask: Tensor | None = None,
    time_mask: Tensor | None = None,
    mask_value: float = 0.0,
    crop: tuple[int, int] = (1, 1),
    lengths: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as :func:`musiclm_fast.ops.spectrogram`, step by step."""
    compute = torch.float64 if wav.dtype == torch.float64 else torch.float32
    signal = wav.to(compute)
    window = window.to(compute)
    frames = num_frames(wav.shape[-1], n_fft, hop_length, pad, center)

    def spectra(clips: Tensor, rate: float | Tensor | None) -> Tensor:
        stft = torch.stft(
            F.pad(clips, (pad, pad)), n_fft, hop_length, window.shape[0], window,
            center=center, pad_mode=pad_mode, onesided=True, return_complex=True,
        )  # fmt: skip
        spec = stft.abs()
        if rate is not None:
            spec = stretch_time(spec, rate, spec.shape[-1])
        return spec if power == 1.0 else spec.pow(power)

    inside: Tensor | None = None
    if wav.shape[0] == 0:
        spec = signal[:, :1, None].expand(
            0, n_fft // 2 + 1, frames
        )  # torch.stft takes no such batch
    elif lengths is None:
        spec = spectra(signal, stretch_rate)
    else:
        own = lengths.tolist()
        rates: list[Any] = [stretch_rate] * len(own)
        if isinstance(stretch_rate, Tensor) and stretch_rate.numel() > 1:
            rates = list(stretch_rate)
        rows = zip(signal, own, rates, strict=True)
        clips = [spectra(clip[None, :n], rate) for clip, n, rate in rows]
        spec = torch.cat([F.pad(clip, (0, frames - clip.shape[-1])) for clip in clips])
        ends = torch.tensor([clip.shape[-1] for clip in clips], device=wav.device)
        inside = torch.arange(frames, device=wav.device) < ends[:, None]  # (B, T)
    if mel is not None:
        spec = (spec.transpose(1, 2) @ mel.to(compute)).transpose(1, 2)
    if log_offset is not None:
        spec = (spec + log_offset).log()
    if mean != 0.0 or std != 1.0:
        spec = (spec - mean) / std

    bands = spec.shape[1]
    if freq_mask is not None:
        masked = span_mask(freq_mask, bands).any(-2)  # (1 or B, F)
        spec = spec.masked_fill(masked[:, :, None], mask_value)
    if time_mask is not None:
        masked = span_mask(time_mask, frames).any(-2)  # (1 or B, T)
        spec = spec.masked_fill(masked[:, None, :], mask_value)
    if inside is not None:
        spec = spec.masked_fill(~inside[:, None, :], 0.0)
    return spec[:, : bands // crop[0] * crop[0], : frames // crop[1] * crop[1]]
