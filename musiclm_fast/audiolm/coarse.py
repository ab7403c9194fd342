"""Second stage: a transformer over coarse acoustic tokens that follow the semantic ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.positions import FAR, Positions, causal_table, interleaved_offsets
from musiclm_fast.audiolm.stage import (
    DEFAULT_T5_NAME,
    Stage,
    guide,
    join_stacked,
    split_stacked,
    twice,
)
from musiclm_fast.audiolm.token_ids import check_ids, per_quantizer_logits, quantizer_embedding
from musiclm_fast.audiolm.transformer import Transformer, front_length

Logits = tuple[Tensor | None, Tensor]


class CoarseTransformer(Stage):
    """Transformer over semantic, then coarse tokens; arguments and ``state_dict`` of
    audiolm-pytorch.

    Source: AudioLM, https://arxiv.org/abs/2209.03143.

    Args:
        codebook_size: entries of each of the codec's codebooks.
        num_coarse_quantizers: how many of its quantizers this stage writes.
        dim: width.
        depth: layers.
        num_semantic_tokens: clusters of the semantic tokenizer.
        project_semantic_logits: predict the semantic tokens too.
        heads, attn_dropout, ff_dropout, cond_as_self_attn_prefix, grad_shrink_alpha,
        rel_pos_bias, flash_attn, **kwargs: see :class:`.transformer.Transformer`.
        t5_name, cond_dim, has_condition, audio_text_condition, cond_drop_prob: see
            :class:`musiclm_fast.audiolm.stage.Stage`; given text_embeds are always dropped too.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        num_coarse_quantizers: int,
        dim: int,
        depth: int,
        num_semantic_tokens: int,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        t5_name: str = DEFAULT_T5_NAME,
        has_condition: bool = False,
        cond_dim: int | None = None,
        audio_text_condition: bool = False,
        cond_as_self_attn_prefix: bool = False,
        cond_drop_prob: float = 0.5,
        grad_shrink_alpha: float = 0.1,
        project_semantic_logits: bool = True,
        rel_pos_bias: bool = True,
        flash_attn: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dim=dim, t5_name=t5_name, cond_dim=cond_dim, has_condition=has_condition,
            audio_text_condition=audio_text_condition, cond_drop_prob=cond_drop_prob,
            drop_text_embeds=True,
        )  # fmt: skip
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
        self.proj_text_embed = self._text_projection()
        has_bias = rel_pos_bias and not flash_attn
        self.cross_attn_bias = nn.Parameter(torch.zeros(heads, 1, 1)) if has_bias else None
        self.transformer = Transformer(
            dim=dim, depth=depth, heads=heads, attn_dropout=attn_dropout, ff_dropout=ff_dropout,
            cross_attend=self.has_condition and not cond_as_self_attn_prefix,
            cond_as_self_attn_prefix=cond_as_self_attn_prefix,
            grad_shrink_alpha=grad_shrink_alpha, rel_pos_bias=rel_pos_bias,
            flash_attn=flash_attn, **kwargs,
        )  # fmt: skip
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

        The end token of one quantizer shares its row with the next one's code 0, as in
        audiolm-pytorch: neither training nor sampling ever embeds an end token.
        """
        length = ids.shape[1]
        quantizer = interleaved_offsets(self.num_coarse_quantizers, length, ids.device)
        embeds = self.coarse_embedding(ids + self.codebook_size * quantizer)
        embeds = embeds + quantizer_embedding(self.coarse_quantize_embedding.weight, length)
        start = self.coarse_start_token.expand(ids.shape[0], 1, -1)
        return torch.cat((start, embeds), dim=1)

    def positions(self, semantic: int, coarse: int, context: Tensor | None) -> Positions | None:
        """Position bias of two segments of so many tokens (start tokens included).

        Within a segment it is the offset's; across it is constant: the second segment's codes are
        far from the first's, so that those pairs fall on the table's right edge. The prefix is
        further still, so that it is left of every query.
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
    ) -> Logits | tuple[Logits, tuple[Tensor, Tensor]]:
        """Logits of each next token.

        Args:
            semantic_token_ids: ``(B, s)``, -1 is padding.
            coarse_token_ids: ``(B, c)`` interleaved, or ``(B, steps, quantizers)``.
            self_attn_mask: ``(B, s + c + 2)`` bool, which tokens are seen.
            text: a text per row, in place of text_embeds.
            text_embeds: ``(B, n, cond_dim)``, the condition.
            cond_drop_prob: share of rows without condition; default the model's.
            return_only_coarse_logits: None for the semantic ones.
            return_cache: return keys and values and the outputs too.
            kv_cache: ``(depth, 2, B, cached, dim_head)`` of an earlier call on a beginning.
            embed_cache: ``(B, cached, dim)``, that call's outputs.

        Returns:
            Semantic logits ``(B, s, num_semantic_tokens + 1)`` and coarse ones
            ``(B, c + 1, codebook_size + 1)``.

        Raises:
            ValueError, TypeError: ids or condition are not as above.
        """
        check_ids("semantic_token_ids", semantic_token_ids, (2, 3))
        context, context_mask = self.condition(
            semantic_token_ids.shape[0], text, text_embeds, cond_drop_prob
        )
        logits, caches = self._logits(
            semantic_token_ids, coarse_token_ids, context, context_mask, self_attn_mask,
            return_only_coarse_logits, kv_cache, embed_cache, return_cache,
        )  # fmt: skip
        return logits if caches is None else (logits, caches)

    def _logits(
        self, semantic_token_ids: Tensor, coarse_token_ids: Tensor, context: Tensor | None,
        context_mask: Tensor | None, self_attn_mask: Tensor | None, only_coarse: bool,
        kv_cache: Tensor | None, embed_cache: Tensor | None, keep: bool,
    ) -> tuple[Logits, tuple[Tensor, Tensor] | None]:  # fmt: skip
        check_ids("coarse_token_ids", coarse_token_ids, (2, 3))
        semantic = self.embed_semantic(semantic_token_ids.flatten(1))
        coarse = self.embed_coarse(coarse_token_ids.flatten(1))
        tokens = torch.cat((semantic, coarse), dim=1)
        batch, length = tokens.shape[:2]
        cache = self.open_cache(kv_cache, batch, length, context, keep)
        held = self.held_tokens(cache, context)
        positions = self.positions(semantic.shape[1], coarse.shape[1], context)
        hidden = self.transformer(
            tokens[:, held:], self_attn_mask=self_attn_mask, context=context,
            context_mask=context_mask, cache=cache,
            attn_bias=None if positions is None else positions.part(held, length),
        )  # fmt: skip
        if embed_cache is not None:
            hidden = torch.cat((embed_cache, hidden), dim=1)
        split = semantic.shape[1]
        semantic_logits = None
        if self.to_semantic_logits is not None and not only_coarse:
            semantic_logits = self.to_semantic_logits(hidden[:, : split - 1])
        logits = (
            semantic_logits,
            per_quantizer_logits(self.coarse_logit_weights, hidden[:, split:]),
        )
        return logits, None if cache is None else (cache.stacked(), hidden)

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
    ) -> Logits | tuple[Logits, tuple[Tensor, Tensor]]:
        """Guided logits, from one forward pass over both halves; see :meth:`forward`.

        The caches have a first dimension for the halves.
        """
        check_ids("semantic_token_ids", semantic_token_ids, (2, 3))
        context, context_mask, halves = self.guided_condition(
            semantic_token_ids.shape[0], text, text_embeds, cond_scale
        )
        (semantic, coarse), caches = self._logits(
            twice(semantic_token_ids, halves), twice(coarse_token_ids, halves), context,
            context_mask, None if self_attn_mask is None else twice(self_attn_mask, halves),
            return_only_coarse_logits, split_stacked(kv_cache),
            None if embed_cache is None else embed_cache.flatten(0, 1), return_kv_cache,
        )  # fmt: skip
        logits = (
            None if semantic is None else guide(semantic, cond_scale, halves),
            guide(coarse, cond_scale, halves),
        )
        if caches is None:
            return logits
        kept, hidden = caches
        return logits, (
            join_stacked(kept, halves),
            hidden.unflatten(0, (2 if halves else 1, -1)),
        )
