"""A semantic tokenizer that fits in seconds: k-means of log-mel spectra."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.mel import OFFSET, Fitted, LogMel
from musiclm_fast.nn.kmeans import kmeans, nearest


class MelKmeans(Fitted):
    """Semantic tokens as clusters of log-mel frames with most of the loudness removed.

    Args:
        codebook_size: clusters.
        target_sample_hz: rate in Hz.
        downsample_factor: samples per token. The default is 25 tokens a second.
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
        self.mel = LogMel(target_sample_hz, 1024, downsample_factor, bands, OFFSET)
        self.register_buffer("centres", torch.zeros(codebook_size, bands + 1))
        self.register_buffer("is_fitted", torch.tensor(False))

    def _features(self, wave: Tensor) -> Tensor:
        mel = self.mel(wave)
        loudness = mel.mean(dim=-1, keepdim=True)
        # The loudness stays as one of the features.
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
