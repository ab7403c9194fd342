"""MusicLM: text to music by way of a quantized joint embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from musiclm_fast._checks import check_positive_int, describe, fail
from musiclm_fast.models.quantizer import MuLaNEmbedQuantizer
from musiclm_fast.tokenizer import tokenizer


class MusicLM(nn.Module):
    """Generates music for a text and keeps the sample that MuLaN likes best.

    Source: https://arxiv.org/abs/2301.11325.

    Args:
        audio_lm: an AudioLM (of this package or of audiolm-pytorch) without a conditioner of its
            own; called as ``audio_lm(text_embeds=..., **kwargs)``.
        mulan_embed_quantizer: the quantizer that the stages were trained with.

    Raises:
        ValueError: audio_lm already has a conditioner.
    """

    def __init__(self, audio_lm: nn.Module, mulan_embed_quantizer: MuLaNEmbedQuantizer) -> None:
        super().__init__()
        if getattr(audio_lm, "audio_conditioner", None) is not None:
            fail(
                "audio_lm",
                "an AudioLM with its own audio_conditioner",
                "one without: MusicLM embeds the text itself",
            )
        self.mulan_embed_quantizer = mulan_embed_quantizer
        self.audio_lm = audio_lm

    @property
    def device(self) -> torch.device:
        return next(self.mulan_embed_quantizer.parameters()).device

    @torch.no_grad()
    def forward(self, text: str, num_samples: int = 1, **audio_lm_kwargs: Any) -> Any:
        """Generate music.

        Args:
            text: what the music should be.
            num_samples: how many samples to draw; the best one under MuLaN is returned.
            **audio_lm_kwargs: passed on to the AudioLM.

        Returns:
            What the AudioLM returns for one sample: ``(1, samples)``, or a list of one waveform.

        Raises:
            ValueError, TypeError: an empty text, no samples.
        """
        if not isinstance(text, str):
            fail("text", describe(text), "a string", TypeError)
        if not text.strip():
            fail("text", repr(text), "a text that says something")
        check_positive_int("num_samples", num_samples)
        self.eval()
        mulan = self.mulan_embed_quantizer.mulan
        texts = tokenizer.tokenize([text], context_length=mulan.text.max_seq_len).to(self.device)
        text_embeds = self.mulan_embed_quantizer(texts=texts)
        samples = [
            self.audio_lm(text_embeds=text_embeds, **audio_lm_kwargs) for _ in range(num_samples)
        ]
        if num_samples == 1:
            return samples[0]
        text_latent = mulan.get_text_latents(texts)
        scores = torch.stack(
            [(mulan.get_audio_latents(_as_batch(music)) * text_latent).sum() for music in samples]
        )
        return samples[int(scores.argmax())]


def _as_batch(music: Tensor | list[Tensor]) -> Tensor:
    # An AudioLM returns (1, n), (1, 1, n), or a list with one waveform per row.
    wave = music[0] if isinstance(music, (list, tuple)) else music
    return wave.reshape(1, -1)
