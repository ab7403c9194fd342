"""A semantic tokenizer and a codec that need no download: fitted by k-means, in seconds.

They are small stand-ins for HuBERT and EnCodec, good enough to hear whether the stages learned
anything: the tokenizer clusters log-mel frames of 40 ms, the codec quantizes log-mel frames of
20 ms residually and gives them a phase by Griffin-Lim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_ndim, check_positive_int, describe, fail
from musiclm_fast.models.clustering import kmeans, nearest
from musiclm_fast.models.resample import resample
from musiclm_fast.ops import mel_filters

# Added to mel magnitudes before the logarithm, about 60 dB below a loud note's: clusters are not
# spent on what nobody hears.
_OFFSET = 0.1


class _LogMel(nn.Module):
    # Log-mel frames (B, L // hop, bands) of waves (B, L), each centred on its own hop.
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
        """``(B, frames * hop)``, least squares."""
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
        """A wave with that log-mel spectrogram. https://doi.org/10.1109/WASPAA.2013.6701851"""
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


class _Fitted(nn.Module):
    # What tokenizer and codec share: rate, frames, fitting on clips.
    target_sample_hz: int
    downsample_factor: int
    is_fitted: Tensor

    @property
    def seq_len_multiple_of(self) -> int:
        """Samples of a token; clips are best cut to a multiple."""
        return self.downsample_factor

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` or a checkpoint filled the clusters."""
        return bool(self.is_fitted)

    def _wave(self, wave: Tensor, input_sample_hz: int | None) -> Tensor:
        check_ndim("wave", wave, 2, "(B, samples)")
        wave = resample(wave, input_sample_hz, self.target_sample_hz)
        whole = wave.shape[1] // self.downsample_factor * self.downsample_factor
        if whole == 0:
            fail("wave", describe(wave), f"at least {self.downsample_factor} samples per row")
        return wave[:, :whole]

    def _features(self, wave: Tensor) -> Tensor:
        raise NotImplementedError

    def _collect(self, clips: Iterable[Any], hz: int | None, limit: int) -> Tensor:
        frames: list[Tensor] = []
        count = 0
        for clip in clips:
            wave = clip[0] if isinstance(clip, (tuple, list)) else clip
            frames.append(self._features(self._wave(wave.reshape(1, -1), hz))[0])
            count += frames[-1].shape[0]
            if count >= limit:
                break
        if not frames:
            fail("clips", "no clip", "at least one")
        return torch.cat(frames)[:limit]

    def _check_fitted(self) -> None:
        if not self.fitted:
            fail(type(self).__name__, "one that is not fitted", "fit() or a checkpoint first")


class MelKmeans(_Fitted):
    """Semantic tokens as clusters of log-mel frames, loudness taken out: 25 a second.

    Args:
        codebook_size: clusters.
        target_sample_hz: rate in Hz.
        downsample_factor: samples per token.
        bands: mel bands.
    """

    centres: Tensor

    def __init__(
        self,
        codebook_size: int = 128,
        target_sample_hz: int = 16_000,
        downsample_factor: int = 640,
        bands: int = 64,
    ) -> None:
        super().__init__()
        check_positive_int("codebook_size", codebook_size)
        self.codebook_size = codebook_size
        self.target_sample_hz, self.downsample_factor = target_sample_hz, downsample_factor
        self.mel = _LogMel(target_sample_hz, 1024, downsample_factor, bands, _OFFSET)
        self.register_buffer("centres", torch.zeros(codebook_size, bands + 1))
        self.register_buffer("is_fitted", torch.tensor(False))

    def _features(self, wave: Tensor) -> Tensor:
        mel = self.mel(wave)
        loudness = mel.mean(dim=-1, keepdim=True)
        # the shape of the spectrum, and a little of how loud it is
        return torch.cat((mel - loudness, loudness), dim=-1)

    @torch.no_grad()
    def fit(
        self,
        clips: Iterable[Any],
        input_sample_hz: int | None = None,
        max_frames: int = 50_000,
        seed: int = 0,
    ) -> MelKmeans:
        """Fit the clusters to clips ``(samples,)``, or tuples that start with one."""
        frames = self._collect(clips, input_sample_hz, max_frames)
        generator = torch.Generator().manual_seed(seed)
        self.centres.copy_(kmeans(frames, self.codebook_size, 25, generator)[0])
        self.is_fitted.fill_(True)
        return self

    @torch.no_grad()
    def forward(
        self, wav_input: Tensor, flatten: bool = True, input_sample_hz: int | None = None
    ) -> Tensor:
        """Tokens ``(B, samples // downsample_factor)`` of waves ``(B, samples)``."""
        self._check_fitted()
        features = self._features(self._wave(wav_input, input_sample_hz))
        index, _ = nearest(features.flatten(0, 1), self.centres)
        return index.view(features.shape[:2])


class MelCodec(_Fitted):
    """Acoustic tokens as residual clusters of log-mel frames, 50 a second; sound by Griffin-Lim.

    Args:
        num_quantizers: residual codebooks.
        codebook_size: entries of each.
        target_sample_hz: rate in Hz.
        downsample_factor: samples per time step; a frame has 1024 samples, or three steps'.
        bands: mel bands.
        iterations: of Griffin-Lim.
    """

    rq_groups = 1
    books: Tensor
    mean: Tensor

    def __init__(
        self,
        num_quantizers: int = 8,
        codebook_size: int = 256,
        target_sample_hz: int = 16_000,
        downsample_factor: int = 320,
        bands: int = 96,
        iterations: int = 32,
    ) -> None:
        super().__init__()
        check_positive_int("num_quantizers", num_quantizers)
        check_positive_int("codebook_size", codebook_size)
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.target_sample_hz, self.downsample_factor = target_sample_hz, downsample_factor
        self.codebook_dim, self.iterations = bands, iterations
        n_fft = max(1024, 3 * downsample_factor)
        self.mel = _LogMel(target_sample_hz, n_fft, downsample_factor, bands, _OFFSET)
        self.register_buffer("books", torch.zeros(num_quantizers, codebook_size, bands))
        self.register_buffer("mean", torch.zeros(bands))
        self.register_buffer("is_fitted", torch.tensor(False))

    def _features(self, wave: Tensor) -> Tensor:
        frames: Tensor = self.mel(wave)
        return frames

    @torch.no_grad()
    def fit(
        self,
        clips: Iterable[Any],
        input_sample_hz: int | None = None,
        max_frames: int = 100_000,
        seed: int = 0,
    ) -> MelCodec:
        """Fit the codebooks to clips ``(samples,)``, or tuples that start with one."""
        rest = self._collect(clips, input_sample_hz, max_frames)
        self.mean.copy_(rest.mean(dim=0))
        rest = rest - self.mean
        generator = torch.Generator().manual_seed(seed)
        for book in self.books:
            book.copy_(kmeans(rest, self.codebook_size, 20, generator)[0])
            rest = rest - book[nearest(rest, book)[0]]
        self.is_fitted.fill_(True)
        return self

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        input_sample_hz: int | None = None,
        return_encoded: bool = False,
        **ignored: Any,
    ) -> tuple[Tensor | None, Tensor, None]:
        """Codes of waves.

        Returns:
            The quantized frames ``(B, steps, bands)`` (None without return_encoded), the codes
            ``(B, steps, num_quantizers)`` and None.
        """
        self._check_fitted()
        frames = self._features(self._wave(x, input_sample_hz))
        rest = frames.flatten(0, 1) - self.mean
        codes: list[Tensor] = []
        for book in self.books:
            index, _ = nearest(rest, book)
            rest = rest - book[index]
            codes.append(index)
        ids = torch.stack(codes, dim=-1).view(*frames.shape[:2], -1)
        embeds = self.get_emb_from_indices(ids) if return_encoded else None
        return embeds, ids, None

    def get_emb_from_indices(self, indices: Tensor) -> Tensor:
        """Frames ``(B, steps, bands)`` of codes of all quantizers or the first few."""
        quantizer = torch.arange(indices.shape[-1], device=indices.device)
        return self.books[quantizer, indices].sum(dim=-2) + self.mean

    @torch.no_grad()
    def decode(self, emb: Tensor) -> Tensor:
        """Waves ``(B, 1, samples)`` of frames ``(B, steps, bands)``."""
        wave = self.mel.griffin_lim(emb, self.iterations)
        return wave[:, None]

    def decode_from_codebook_indices(self, quantized_indices: Tensor) -> Tensor:
        """Waves ``(B, 1, samples)`` of codes ``(B, steps, quantizers)``."""
        self._check_fitted()
        return self.decode(self.get_emb_from_indices(quantized_indices))
