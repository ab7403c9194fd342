"""Semantic tokens: clustered outputs of a layer of HuBERT or another transformers audio model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musiclm_fast._checks import check_ndim, check_positive_int, describe, fail
from musiclm_fast.audio.resampling import resample
from musiclm_fast.audiolm.hubert_checkpoints import load_audio_model, load_centres
from musiclm_fast.audiolm.mel import collect_frames
from musiclm_fast.nn.kmeans import kmeans, nearest


class HubertWithKmeans(nn.Module):
    """Semantic tokens of a HuBERT layer, with upstream's arguments and without fairseq.

    Sources: https://arxiv.org/abs/2106.07447, https://arxiv.org/abs/2306.00107 (MERT).

    Args:
        checkpoint_path: the original fairseq ``.pt`` file, read without executing its pickles; a
            folder or name of a transformers model that returns hidden states (HuBERT, wav2vec 2.0,
            WavLM, MERT); or such a model.
        kmeans_path: cluster centres: ``.npz`` or ``.npy`` (see :func:`convert_kmeans`), the
            original joblib file, or a tensor ``(clusters, dim)``; None to :meth:`fit` them.
        target_sample_hz: rate in Hz.
        seq_len_multiple_of: clips are cut to a multiple of this number of samples.
        output_layer: layer whose output is clustered; the first is 1.
        codebook_size: number of clusters to fit without kmeans_path.
        model_kwargs: passed to ``from_pretrained``.
    """

    groups = 1
    cluster_centers: Tensor

    def __init__(
        self,
        checkpoint_path: str | Path | nn.Module,
        kmeans_path: str | Path | Tensor | None = None,
        target_sample_hz: int = 16_000,
        seq_len_multiple_of: int | None = None,
        output_layer: int = 9,
        *,
        codebook_size: int = 500,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.target_sample_hz = target_sample_hz
        self.seq_len_multiple_of = seq_len_multiple_of
        self.output_layer = output_layer
        self.model: Any = load_audio_model(checkpoint_path, **(model_kwargs or {}))
        self.model.eval()
        config: Any = self.model.config
        layers, width = config.num_hidden_layers, config.hidden_size
        if not 1 <= output_layer <= layers:
            fail("output_layer", output_layer, f"1 to {layers}")
        if kmeans_path is None:
            check_positive_int("codebook_size", codebook_size)
            centres = torch.full((codebook_size, width), torch.nan)
        elif isinstance(kmeans_path, Tensor):
            centres = kmeans_path.float()
        else:
            centres = load_centres(kmeans_path)
        if centres.ndim != 2 or centres.shape[1] != width:
            fail("kmeans_path", describe(centres), f"centres (clusters, {width})")
        self.register_buffer("cluster_centers", centres)

    @property
    def codebook_size(self) -> int:
        """Number of clusters."""
        return self.cluster_centers.shape[0]

    @property
    def downsample_factor(self) -> int:
        """Samples per token."""
        strides = getattr(self.model.config, "conv_stride", (5, 2, 2, 2, 2, 2, 2))
        return int(np.prod(strides))

    @property
    def fitted(self) -> bool:
        """Whether the centres are set."""
        return bool(torch.isfinite(self.cluster_centers).all())

    @torch.no_grad()
    def features(self, wave: Tensor) -> Tensor:
        """The layer's output ``(B, n, dim)`` for waves ``(B, samples)``."""
        self.model.eval()
        hidden = self.model(wave, output_hidden_states=True).hidden_states
        layer: Tensor = hidden[self.output_layer]
        return layer

    def fit(
        self,
        clips: Iterable[Any],
        input_sample_hz: int | None = None,
        max_frames: int = 100_000,
        seed: int = 0,
    ) -> HubertWithKmeans:
        """Fit the centres to clips ``(samples,)``, or tuples that start with one."""

        def features(wave: Tensor) -> Tensor:
            wave = resample(wave, input_sample_hz, self.target_sample_hz)
            return self.features(wave.to(self.cluster_centers.device))

        points = collect_frames(clips, features, max_frames)
        generator = torch.Generator().manual_seed(seed)
        self.cluster_centers.copy_(kmeans(points, self.codebook_size, 25, generator)[0])
        return self

    @torch.no_grad()
    def forward(
        self, wav_input: Tensor, flatten: bool = True, input_sample_hz: int | None = None
    ) -> Tensor:
        """Tokens ``(B, n)`` of waves ``(B, samples)``."""
        check_ndim("wav_input", wav_input, 2, "(B, samples)")
        if not self.fitted:
            fail("HubertWithKmeans", "one without centres", "kmeans_path, or fit() first")
        wave = resample(wav_input, input_sample_hz, self.target_sample_hz)
        if self.seq_len_multiple_of is not None:
            wave = wave[:, : wave.shape[1] // self.seq_len_multiple_of * self.seq_len_multiple_of]
        features = self.features(wave)
        index, _ = nearest(features.flatten(0, 1).float(), self.cluster_centers)
        return index.view(features.shape[:2])
