"""The base of the tokenizer and the codec on log-mel spectra."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_ndim, describe, fail
from musiclm_fast._wording import plural
from musiclm_fast.audio.resampling import resample
from musiclm_fast.ops import mel_filters

# Added to mel magnitudes before the logarithm, about 60 dB below those of a loud note. It keeps
# clusters from being spent on inaudible differences.
OFFSET = 0.1


class LogMel(nn.Module):
    """Log-mel frames ``(B, L // hop, bands)`` of waves ``(B, L)``, each centred on its hop."""

    window: Tensor
    filters: Tensor
    inverse: Tensor

    def __init__(self, sample_hz: int, n_fft: int, hop: int, bands: int, offset: float) -> None:
        super().__init__()
        self.n_fft, self.hop, self.offset = n_fft, hop, offset
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        filters = mel_filters(sample_hz, n_fft, bands).t().contiguous()  # (bands, bins)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(filters.double()).float(), False)

    def stft(self, wave: Tensor) -> Tensor:
        """``(B, bins, frames)`` complex."""
        spare = (self.n_fft - self.hop) // 2
        wave = F.pad(wave, (spare, self.n_fft - self.hop - spare))
        return torch.stft(wave, self.n_fft, self.hop, window=self.window, center=False,
                          return_complex=True)  # fmt: skip

    def istft(self, spectrum: Tensor) -> Tensor:
        """Least-squares inverse of :meth:`stft`, ``(B, frames * hop)``."""
        frames = torch.fft.irfft(spectrum, n=self.n_fft, dim=1) * self.window[:, None]
        count = spectrum.shape[-1]
        length = (count - 1) * self.hop + self.n_fft
        shape = dict(output_size=(1, length), kernel_size=(1, self.n_fft), stride=(1, self.hop))
        weight = self.window.square()[None, :, None].expand(1, -1, count)
        wave = F.fold(frames, **shape)[:, 0, 0] / F.fold(weight, **shape)[:, 0, 0].clamp_min(1e-6)
        spare = (self.n_fft - self.hop) // 2
        return wave[:, spare : spare + count * self.hop]

    def forward(self, wave: Tensor) -> Tensor:
        mel = self.filters @ self.stft(wave).abs()
        return (mel + self.offset).log().transpose(1, 2)

    def griffin_lim(self, log_mel: Tensor, iterations: int, momentum: float = 0.99) -> Tensor:
        """Estimate a wave from a log-mel spectrogram. https://doi.org/10.1109/WASPAA.2013.6701851"""
        mel = (log_mel.transpose(1, 2).exp() - self.offset).clamp_min(0)
        magnitude = (self.inverse @ mel).clamp_min(0)
        generator = torch.Generator().manual_seed(0)
        angle = torch.rand(magnitude.shape, generator=generator).to(magnitude.device)
        phase = torch.polar(torch.ones_like(angle), angle * 2 * torch.pi)
        before = torch.zeros_like(phase)
        for _ in range(iterations):
            rebuilt = self.stft(self.istft(magnitude * phase))
            phase = rebuilt - before * (momentum / (1 + momentum))
            phase = phase / phase.abs().clamp_min(1e-9)
            before = rebuilt
        return self.istft(magnitude * phase)


class Fitted(nn.Module):
    """A module with a sample rate and frames whose clusters are fitted to clips."""

    target_sample_hz: int
    downsample_factor: int
    is_fitted: Tensor

    @property
    def seq_len_multiple_of(self) -> int:
        """Samples per token. Trainers cut clips to a multiple of it."""
        return self.downsample_factor

    @property
    def fitted(self) -> bool:
        """Whether the clusters are set, by :meth:`fit` or a checkpoint."""
        return bool(self.is_fitted)

    def _wave(self, wave: Tensor, input_sample_hz: int | None) -> Tensor:
        check_ndim("wave", wave, 2, "(B, samples)")
        wave = resample(wave, input_sample_hz, self.target_sample_hz)
        whole = wave.shape[1] // self.downsample_factor * self.downsample_factor
        if whole == 0:
            fail(
                "wave",
                describe(wave),
                f"at least {plural(self.downsample_factor, 'sample')} per row",
            )
        return wave[:, :whole]

    def _features(self, wave: Tensor) -> Tensor:
        raise NotImplementedError

    def _collect(self, clips: Iterable[Any], hz: int | None, limit: int) -> Tensor:
        return collect_frames(clips, lambda wave: self._features(self._wave(wave, hz)), limit)

    def _check_fitted(self) -> None:
        if not self.fitted:
            fail(type(self).__name__, "one that is not fitted", "fit() or a checkpoint first")


def collect_frames(
    clips: Iterable[Any], features: Callable[[Tensor], Tensor], limit: int
) -> Tensor:
    """Up to ``limit`` frames ``(n, dim)`` of clips.

    Args:
        clips: waves ``(samples,)``, or tuples that start with one.
        features: gives the frames ``(1, n, dim)`` of a wave ``(1, samples)``.
        limit: maximum number of frames.
    """
    frames: list[Tensor] = []
    count = 0
    for clip in clips:
        wave = clip[0] if isinstance(clip, (tuple, list)) else clip
        frames.append(features(wave.reshape(1, -1))[0])
        count += frames[-1].shape[0]
        if count >= limit:
            break
    if not frames:
        fail("clips", "no clip", "at least one")
    return torch.cat(frames)[:limit]
