"""Second stage: a transformer over coarse acoustic tokens that follow the semantic ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.acoustic import AcousticStage, Caches, Logits
from musiclm_fast.audiolm.positions import FAR, Positions, causal_table
from musiclm_fast.audiolm.transformer import front_length


class CoarseTransformer(AcousticStage):
    """Transformer over semantic, then coarse tokens, with upstream's arguments and ``state_dict``.

    Source: AudioLM, https://arxiv.org/abs/2209.03143.

    Args:
        codebook_size: entries of each of the codec's codebooks.
        num_coarse_quantizers: number of the codec's quantizers that this stage predicts.
        dim: width.
        num_semantic_tokens: clusters of the semantic tokenizer.
        project_semantic_logits: also predict the semantic tokens.
        **shared: see :class:`musiclm_fast.audiolm.stage.Stage`; drop_text_embeds is always True.
    """

    namespace = "coarse"

    def __init__(
        self,
        *,
        codebook_size: int,
        num_coarse_quantizers: int,
        dim: int,
        num_semantic_tokens: int,
        project_semantic_logits: bool = True,
        **shared: Any,
    ) -> None:
        super().__init__(dim=dim, drop_text_embeds=True, **shared)
        check_positive_int("num_semantic_tokens", num_semantic_tokens)
        check_positive_int("codebook_size", codebook_size)
        check_positive_int("num_coarse_quantizers", num_coarse_quantizers)
        self.num_semantic_tokens = num_semantic_tokens
        self.codebook_size = codebook_size
        self.num_coarse_quantizers = num_coarse_quantizers
        self.semantic_start_token = nn.Parameter(torch.randn(dim))
        self.coarse_start_token = nn.Parameter(torch.randn(dim))
        self.semantic_eos_id = num_semantic_tokens
        self.semantic_embedding = nn.Embedding(num_semantic_tokens + 1, dim)
        self.coarse_eos_id = codebook_size
        self.coarse_embedding = nn.Embedding(num_coarse_quantizers * (codebook_size + 1), dim)
        self.coarse_quantize_embedding = nn.Embedding(num_coarse_quantizers, dim)
        self._add_transformer()
        has_bias = self.transformer.rel_pos_bias is not None
        heads = self.transformer.heads
        self.cross_attn_bias = nn.Parameter(torch.zeros(heads, 1, 1)) if has_bias else None
        self.to_semantic_logits = (
            nn.Linear(dim, num_semantic_tokens + 1) if project_semantic_logits else None
        )
        self.coarse_logit_weights = nn.Parameter(
            torch.randn(num_coarse_quantizers, codebook_size + 1, dim)
        )

    def embed_semantic(self, ids: Tensor) -> Tensor:
        """The start token and the embeddings of ids ``(B, n)``; ``(B, 1 + n, dim)``."""
        padding = ids == -1
        embeds = self.semantic_embedding(ids.masked_fill(padding, 0))
        embeds = embeds.masked_fill(padding[..., None], 0)
        start = self.semantic_start_token.expand(ids.shape[0], 1, -1)
        return torch.cat((start, embeds), dim=1)

    def embed_coarse(self, ids: Tensor) -> Tensor:
        """The start token and the embeddings of ids ``(B, n)``; ``(B, 1 + n, dim)``.

        As in upstream, a quantizer's end token has the same row as code 0 of the next quantizer.
        Neither training nor sampling embeds an end token.
        """
        return self._embed(
            ids, self.coarse_start_token, self.coarse_embedding, self.coarse_quantize_embedding
        )

    def positions(self, semantic: int, coarse: int, context: Tensor | None) -> Positions | None:
        """Position bias of ``semantic`` and ``coarse`` tokens (start tokens included).

        Within a segment the bias depends on the offset. Between segments it is constant: the second
        segment's codes are far from the first's, so such pairs select the table's right edge. The
        prefix is farther still and selects the left edge.
        """
        net = self.transformer.rel_pos_bias
        if net is None or self.cross_attn_bias is None:
            return None
        offsets = net(max(semantic, coarse))
        zero = offsets.new_zeros(offsets.shape[0], 1)
        ranges = [
            torch.arange(length, dtype=torch.int32, device=offsets.device)
            for length in (semantic, coarse)
        ]
        codes = torch.cat((ranges[0], ranges[1] + FAR))
        front = front_length(self.transformer, context)
        return Positions(
            causal_table(zero, offsets, self.cross_attn_bias[:, 0]),
            codes,
            F.pad(codes, (front, 0), value=3 * FAR),
        )

    def forward(
        self,
        *,
        semantic_token_ids: Tensor,
        coarse_token_ids: Tensor,
        self_attn_mask: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        cond_drop_prob: float | None = None,
        return_only_coarse_logits: bool = False,
        return_cache: bool = False,
        kv_cache: Tensor | None = None,
        embed_cache: Tensor | None = None,
    ) -> Logits | tuple[Logits, Caches]:
        """Logits of each next token.

        Args:
            semantic_token_ids: ``(B, s)``, -1 is padding.
            coarse_token_ids: ``(B, c)`` interleaved, or ``(B, steps, quantizers)``.
            self_attn_mask: ``(B, s + c + 2)`` bool, True for tokens that are seen.
            text: a text per row, in place of text_embeds.
            text_embeds: ``(B, n, cond_dim)``, the condition.
            cond_drop_prob: share of rows without condition; default the model's.
            return_only_coarse_logits: None for the semantic ones.
            return_cache: also return the keys and values and the outputs.
            kv_cache: ``(depth, 2, B, cached, dim_head)`` of an earlier call on a prefix.
            embed_cache: ``(B, cached, dim)``, that call's outputs.

        Returns:
            Semantic logits ``(B, s, num_semantic_tokens + 1)`` and coarse ones
            ``(B, c + 1, codebook_size + 1)``.

        Raises:
            ValueError, TypeError: ids or condition do not match the above.
        """
        return self._result(
            dict(semantic_token_ids=semantic_token_ids, coarse_token_ids=coarse_token_ids),
            text, text_embeds, self_attn_mask, kv_cache, return_cache, embed_cache=embed_cache,
            only_own=return_only_coarse_logits, cond_drop_prob=cond_drop_prob,
        )  # fmt: skip

    def _read(
        self, ids: Sequence[Tensor], self_attn_mask: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Positions | None]:
        semantic, coarse = self.embed_semantic(ids[0]), self.embed_coarse(ids[1])
        positions = self.positions(semantic.shape[1], coarse.shape[1], context)
        return torch.cat((semantic, coarse), dim=1), self_attn_mask, positions

    def _first_logits(self, hidden: Tensor) -> Tensor | None:
        return None if self.to_semantic_logits is None else self.to_semantic_logits(hidden)

    def forward_with_cond_scale(
        self,
        *,
        semantic_token_ids: Tensor,
        coarse_token_ids: Tensor,
        cond_scale: float = 3,
        return_kv_cache: bool = False,
        kv_cache: Tensor | None = None,
        embed_cache: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        return_only_coarse_logits: bool = False,
    ) -> Logits | tuple[Logits, Caches]:
        """Guided logits from one forward pass over both halves; see :meth:`forward`.

        The first dimension of the caches is the halves.
        """
        return self._result(
            dict(semantic_token_ids=semantic_token_ids, coarse_token_ids=coarse_token_ids),
            text, text_embeds, self_attn_mask, kv_cache, return_kv_cache, embed_cache=embed_cache,
            only_own=return_only_coarse_logits, cond_scale=cond_scale,
        )  # fmt: skip
