"""EnCodec through transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_fast._checks import check_choice, check_ndim, check_positive, fail
from musiclm_fast._optional import transformers_class
from musiclm_fast.audio.resampling import resample

_NAMES = {24_000: "facebook/encodec_24khz", 32_000: "facebook/encodec_32khz"}


class EncodecWrapper(nn.Module):
    """EnCodec as the codec of the acoustic stages, with the interface of upstream's wrapper.

    Source: https://arxiv.org/abs/2210.13438.

    Args:
        target_sample_hz: 24000 or 32000; selects the pretrained model.
        strides: strides of the encoder; None takes them from the model.
        num_quantizers: ignored, as upstream does; the bandwidth determines it.
        bandwidth: in kbit/s. None selects 6.0, which is 8 quantizers at 24 kHz, or else the
            model's highest.
        model: a transformers ``EncodecModel``, or its name or folder. It overrides
            target_sample_hz.

    Raises:
        ValueError: the rate or the bandwidth is not one of the model's.
    """

    rq_groups = 1

    def __init__(
        self,
        target_sample_hz: int = 24_000,
        strides: Sequence[int] | None = None,
        num_quantizers: int = 8,
        bandwidth: float | None = None,
        *,
        model: Any = None,
    ) -> None:
        super().__init__()
        if model is None:
            check_choice("target_sample_hz", target_sample_hz, _NAMES)
            model = _NAMES[target_sample_hz]
        if isinstance(model, str):
            model = transformers_class("EncodecModel").from_pretrained(model)
        config = model.config
        if config.audio_channels != 1 or config.normalize:
            fail("model", "one for stereo or normalized sound", "a mono model of 24 or 32 kHz")
        bandwidths = list(config.target_bandwidths)
        if bandwidth is None:
            bandwidth = 6.0 if 6.0 in bandwidths else max(bandwidths)
        check_positive("bandwidth", bandwidth)
        check_choice("bandwidth", bandwidth, bandwidths)
        self.model = model.eval()
        self.bandwidth = bandwidth
        self.target_sample_hz = int(config.sampling_rate)
        self.codebook_size = int(config.codebook_size)
        self.codebook_dim = int(config.hidden_size)
        self.num_quantizers = int(model.quantizer.get_num_quantizers_for_bandwidth(self.bandwidth))
        self.strides = tuple(config.upsampling_ratios if strides is None else strides)

    @property
    def seq_len_multiple_of(self) -> int:
        """Samples of a time step."""
        return math.prod(self.strides)

    @property
    def downsample_factor(self) -> int:
        """Samples of a time step."""
        return self.seq_len_multiple_of

    def train(self, mode: bool = True) -> EncodecWrapper:
        """Stay in eval mode: EnCodec is pretrained and frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        input_sample_hz: int | None = None,
        return_encoded: bool = False,
        **ignored: Any,
    ) -> tuple[Tensor | None, Tensor, None]:
        """Codes of waves ``(B, samples)``.

        Returns:
            The quantized embedding ``(B, steps, dim)`` (None without return_encoded), the codes
            ``(B, steps, num_quantizers)`` and None.
        """
        check_ndim("x", x, 2, "(B, samples)")
        x = resample(x, input_sample_hz, self.target_sample_hz)
        embeddings = self.model.encoder(x[:, None])  # (B, dim, steps)
        codes = self.model.quantizer.encode(embeddings, self.bandwidth)  # (q, B, steps)
        ids = codes.permute(1, 2, 0)
        return self.get_emb_from_indices(ids) if return_encoded else None, ids, None

    @torch.no_grad()
    def get_emb_from_indices(self, indices: Tensor) -> Tensor:
        """Embedding ``(B, steps, dim)`` of codes ``(B, steps, quantizers)``."""
        embedding: Tensor = self.model.quantizer.decode(indices.permute(2, 0, 1))
        return embedding.transpose(1, 2)

    @torch.no_grad()
    def decode(self, emb: Tensor) -> Tensor:
        """Waves ``(B, 1, samples)`` of an embedding ``(B, steps, dim)``."""
        wave: Tensor = self.model.decoder(emb.transpose(1, 2))
        return wave

    def decode_from_codebook_indices(self, quantized_indices: Tensor) -> Tensor:
        """Waves ``(B, 1, samples)`` of codes ``(B, steps, quantizers)``."""
        return self.decode(self.get_emb_from_indices(quantized_indices))
