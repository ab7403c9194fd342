"""Quantized MuLaN embeddings, which condition the stages of AudioLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from musiclm_fast._checks import check_choice, fail
from musiclm_fast.models.conditioner import AudioConditionerBase
from musiclm_fast.models.mulan import MuLaN


class MuLaNEmbedQuantizer(AudioConditionerBase):  # type: ignore[misc, valid-type]
    """Residual vector quantizer over a frozen MuLaN, with conditioning embeddings per namespace.

    Source: MusicLM, https://arxiv.org/abs/2301.11325.

    Args:
        mulan: a trained MuLaN.
        conditioning_dims: width of the conditioning of each namespace.
        rq_num_quantizers: number of residual codebooks.
        rq_ema_decay: decay of the codebooks' moving averages.
        codebook_size: entries of a codebook.
        namespaces: one name per stage that is conditioned.
    """

    def __init__(
        self,
        mulan: MuLaN,
        conditioning_dims: Sequence[int],
        rq_num_quantizers: int = 8,
        rq_ema_decay: float = 0.9,
        codebook_size: int = 1024,
        namespaces: Sequence[str] = ("semantic", "coarse", "fine"),
    ) -> None:
        super().__init__()
        if not namespaces:
            fail("namespaces", namespaces, "at least one name")
        if len(conditioning_dims) != len(namespaces):
            fail(
                "conditioning_dims",
                f"{len(conditioning_dims)} widths",
                f"one for each of the {len(namespaces)} namespaces",
            )
        self.mulan = mulan
        self.namespaces = tuple(namespaces)
        self.conditioning_dims = tuple(conditioning_dims)
        self.rq = ResidualVQ(
            dim=mulan.dim_latent,
            num_quantizers=rq_num_quantizers,
            codebook_size=codebook_size,
            decay=rq_ema_decay,
            commitment_weight=0,  # the codebooks learn by moving averages alone
            kmeans_init=True,
            threshold_ema_dead_code=2,
            quantize_dropout=False,
        )
        self.dim = mulan.dim_latent
        self.num_codebooks = rq_num_quantizers
        self.codebook_size = codebook_size
        # Filled one by one: from a dict, ParameterDict would sort the names, and an optimizer's
        # checkpoint knows parameters by their place only.
        self.cond_embeddings = nn.ParameterDict()
        for namespace, width in zip(namespaces, conditioning_dims, strict=True):
            # Drawn twice, as the reference does, so that the same seed gives the same weights.
            embeddings = nn.Parameter(torch.randn(rq_num_quantizers, codebook_size, width))
            self.cond_embeddings[namespace] = nn.init.normal_(embeddings, std=0.02)
        self.set_default_namespace(self.namespaces[0])

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The conditioning embeddings alone: MuLaN is frozen and the codebooks have no gradient."""
        return self.cond_embeddings.parameters(recurse)

    def set_default_namespace(self, namespace: str) -> None:
        """Choose the namespace that calls without one use."""
        check_choice("namespace", namespace, self.namespaces)
        self._default_namespace = namespace

    def forward(
        self,
        wavs: Tensor | None = None,
        texts: Tensor | None = None,
        namespace: str | None = None,
    ) -> Tensor:
        """Conditioning embeddings of clips or of texts.

        Args:
            wavs: ``(B, samples)`` at MuLaN's rate.
            texts: ``(B, n)`` token ids, in place of clips.
            namespace: whose embeddings; None is the default namespace.

        Returns:
            ``(B, quantizers, conditioning dim)``.

        Raises:
            ValueError: both or none of wavs and texts; an unknown namespace.
        """
        if (wavs is None) == (texts is None):
            fail("wavs, texts", "both" if wavs is not None else "neither", "exactly one of them")
        namespace = self._default_namespace if namespace is None else namespace
        check_choice("namespace", namespace, self.namespaces)
        with torch.no_grad():
            self.mulan.eval()
            latents = (
                self.mulan.get_audio_latents(wavs)
                if wavs is not None
                else self.mulan.get_text_latents(texts)
            )
        _, indices, _ = self.rq(latents)  # (B, q)
        table = self.cond_embeddings[namespace]  # (q, codebook, dim)
        quantizer = torch.arange(self.num_codebooks, device=indices.device)
        embeds: Tensor = table[quantizer, indices]  # (B, q, dim)
        return embeds
