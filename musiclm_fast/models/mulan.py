"""MuLaN: a joint embedding of music and text."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_tensor, describe, fail
from musiclm_fast.models.arguments import record_arguments
from musiclm_fast.models.audio import AudioSpectrogramTransformer
from musiclm_fast.models.contrastive import (
    MultiLayerContrastiveLoss,
    interspersed_indices,
    make_contrastive_loss,
)
from musiclm_fast.models.text import TextTransformer


class MuLaN(nn.Module):
    """Joint embedding of music and text, learned by contrast. https://arxiv.org/abs/2208.12415

    Args:
        audio_transformer: the audio tower.
        text_transformer: the text tower.
        dim_latent: width of the joint space.
        decoupled_contrastive_learning: leave the positive pair out of the denominators.
        hierarchical_contrastive_loss: add the loss at intermediate layers (ViCHA).
        hierarchical_contrastive_loss_layers: how many; default the smaller depth less one.
        sigmoid_contrastive_loss: sigmoid loss in place of softmax.
    """

    audio_layers_indices: Tensor
    text_layers_indices: Tensor
    arguments: dict[str, Any]

    @record_arguments
    def __init__(
        self,
        audio_transformer: AudioSpectrogramTransformer,
        text_transformer: TextTransformer,
        dim_latent: int = 128,
        decoupled_contrastive_learning: bool = True,
        hierarchical_contrastive_loss: bool = False,
        hierarchical_contrastive_loss_layers: int | None = None,
        sigmoid_contrastive_loss: bool = False,
    ) -> None:
        super().__init__()
        self.dim_latent = dim_latent
        self.audio = audio_transformer
        self.text = text_transformer
        self.text_to_latents = nn.Linear(self.text.dim, dim_latent)
        self.audio_to_latents = nn.Linear(self.audio.dim, dim_latent)
        self.contrast = make_contrastive_loss(
            1, decoupled_contrastive_learning, sigmoid_contrastive_loss
        )
        self.multi_layer_contrastive_learning: MultiLayerContrastiveLoss | None = None
        if not hierarchical_contrastive_loss:
            return
        shallower = min(audio_transformer.depth, text_transformer.depth)
        layers = hierarchical_contrastive_loss_layers
        layers = shallower - 1 if layers is None else layers
        if not 0 < layers < shallower:
            fail(
                "hierarchical_contrastive_loss_layers",
                layers,
                f"1 to {shallower - 1}, fewer than the blocks of the shallower tower",
            )
        self.register_buffer(
            "text_layers_indices", interspersed_indices(layers, text_transformer.depth)
        )
        self.register_buffer(
            "audio_layers_indices", interspersed_indices(layers, audio_transformer.depth)
        )
        self.multi_layer_contrastive_learning = MultiLayerContrastiveLoss(
            audio_dim=self.audio.dim, text_dim=self.text.dim, dim_latent=dim_latent,
            layers=layers, decoupled_contrastive_learning=decoupled_contrastive_learning,
            sigmoid_contrastive_loss=sigmoid_contrastive_loss,
        )  # fmt: skip

    @overload
    def get_audio_latents(self, wavs: Tensor) -> Tensor: ...

    @overload
    def get_audio_latents(
        self, wavs: Tensor, return_all_layers: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def get_audio_latents(
        self, wavs: Tensor, return_all_layers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            wavs: ``(B, samples)``, or spectrograms where the audio tower accepts those.
            return_all_layers: also return the tower's intermediate layers.

        Returns:
            Unit vectors ``(B, dim_latent)``; with ``return_all_layers`` also
            ``(depth - 1, B, patches, audio dim)``.
        """
        if not return_all_layers:
            return F.normalize(self.audio_to_latents(self.audio(wavs)), dim=-1)
        embeds, layers = self.audio(wavs, return_all_layers=True)
        return F.normalize(self.audio_to_latents(embeds), dim=-1), layers

    @overload
    def get_text_latents(
        self, texts: Tensor | None = None, raw_texts: list[str] | None = None
    ) -> Tensor: ...

    @overload
    def get_text_latents(
        self, texts: Tensor | None, raw_texts: list[str] | None, return_all_layers: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def get_text_latents(
        self,
        texts: Tensor | None = None,
        raw_texts: list[str] | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed texts.

        Args:
            texts: ``(B, n)`` token ids.
            raw_texts: B strings, in place of token ids.
            return_all_layers: also return the tower's intermediate layers.

        Returns:
            Unit vectors ``(B, dim_latent)``; with ``return_all_layers`` also
            ``(depth - 1, B, 1 + n, text dim)``.
        """
        if not return_all_layers:
            return F.normalize(self.text_to_latents(self.text(texts, raw_texts)), dim=-1)
        embeds, layers = self.text(texts, raw_texts, return_all_layers=True)
        return F.normalize(self.text_to_latents(embeds), dim=-1), layers

    def forward(
        self,
        wavs: Tensor,
        texts: Tensor | None = None,
        raw_texts: list[str] | None = None,
        return_latents: bool = False,
        return_similarities: bool = False,
        return_pairwise_similarities: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Contrastive loss of B pairs, or what one of the flags asks for.

        Args:
            wavs: ``(B, samples)``, or spectrograms where the audio tower accepts those.
            texts: ``(B, n)`` token ids.
            raw_texts: B strings, in place of token ids.
            return_latents: return both sets of unit vectors ``(B, dim_latent)``.
            return_similarities: return the cosine of each pair ``(B,)``.
            return_pairwise_similarities: return all cosines ``(B clips, B texts)``.

        Raises:
            ValueError, TypeError: see the towers; batches of different sizes; both or none of
                texts and raw_texts.
        """
        check_tensor("wavs", wavs)
        if (texts is None) == (raw_texts is None):
            both = "both" if texts is not None else "neither"
            fail("texts, raw_texts", both, "exactly one of them")
        count = len(raw_texts) if raw_texts is not None else texts.shape[0]  # type: ignore[union-attr]
        if not return_pairwise_similarities and count != wavs.shape[0]:
            fail("wavs", describe(wavs), f"as many clips as there are texts ({count})")
        wants_layers = self.multi_layer_contrastive_learning is not None and not (
            return_latents or return_similarities or return_pairwise_similarities
        )
        audio_layers = text_layers = None
        if wants_layers:
            audio, audio_layers = self.get_audio_latents(wavs, True)
            text, text_layers = self.get_text_latents(texts, raw_texts, True)
        else:
            audio = self.get_audio_latents(wavs)
            text = self.get_text_latents(texts, raw_texts)

        if return_latents:
            return audio, text
        if return_similarities:
            return (audio * text).sum(dim=-1)
        if return_pairwise_similarities:
            return audio @ text.t()
        loss: Tensor = self.contrast(audio, text)
        if self.multi_layer_contrastive_learning is None:
            return loss
        assert audio_layers is not None and text_layers is not None
        return loss + self.multi_layer_contrastive_learning(
            audio_layers=audio_layers[self.audio_layers_indices],
            text_layers=text_layers[self.text_layers_indices],
        )
