"""A codec that fits in seconds: residual vector quantization of log-mel spectra."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.mel import OFFSET, Fitted, LogMel
from musiclm_fast.nn.kmeans import kmeans, nearest


class MelCodec(Fitted):
    """Acoustic tokens as residual clusters of log-mel frames, decoded by Griffin-Lim.

    Args:
        num_quantizers: residual codebooks.
        codebook_size: entries of each.
        target_sample_hz: rate in Hz.
        downsample_factor: samples per time step. The default is 50 steps a second. A frame has
            1024 samples, or those of three time steps if that is more.
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
        self.mel = LogMel(target_sample_hz, n_fft, downsample_factor, bands, OFFSET)
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
        """Frames ``(B, steps, bands)`` of codes, of all quantizers or the first ones."""
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
