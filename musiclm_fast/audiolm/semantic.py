"""First stage: a transformer over semantic tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.cache import Cache
from musiclm_fast.audiolm.positions import FAR, Positions, causal_table
from musiclm_fast.audiolm.stage import (
    DEFAULT_T5_NAME,
    Stage,
    guide,
    join_stacked,
    split_stacked,
    twice,
)
from musiclm_fast.audiolm.token_ids import check_ids
from musiclm_fast.audiolm.transformer import Transformer, front_length


class SemanticTransformer(Stage):
    """Transformer over semantic tokens; arguments and ``state_dict`` of audiolm-pytorch.

    Source: AudioLM, https://arxiv.org/abs/2209.03143.

    Args:
        dim: width.
        depth: layers.
        num_semantic_tokens: clusters of the semantic tokenizer.
        heads, attn_dropout, ff_dropout, cond_as_self_attn_prefix, grad_shrink_alpha,
        rel_pos_bias, flash_attn, **kwargs: see :class:`.transformer.Transformer`.
        t5_name, cond_dim, has_condition, audio_text_condition, cond_drop_prob, drop_text_embeds:
            see :class:`musiclm_fast.audiolm.stage.Stage`.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_semantic_tokens: int,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        t5_name: str = DEFAULT_T5_NAME,
        cond_dim: int | None = None,
        has_condition: bool = False,
        audio_text_condition: bool = False,
        cond_as_self_attn_prefix: bool = False,
        cond_drop_prob: float = 0.5,
        grad_shrink_alpha: float = 0.1,
        rel_pos_bias: bool = True,
        flash_attn: bool = False,
        drop_text_embeds: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dim=dim, t5_name=t5_name, cond_dim=cond_dim, has_condition=has_condition,
            audio_text_condition=audio_text_condition, cond_drop_prob=cond_drop_prob,
            drop_text_embeds=drop_text_embeds,
        )  # fmt: skip
        check_positive_int("num_semantic_tokens", num_semantic_tokens)
        self.num_semantic_tokens = num_semantic_tokens
        self.start_token = nn.Parameter(torch.randn(dim))
        self.semantic_embedding = nn.Embedding(num_semantic_tokens + 1, dim)
        self.eos_id = num_semantic_tokens
        self.proj_text_embed = self._text_projection()
        self.transformer = Transformer(
            dim=dim, depth=depth, heads=heads, attn_dropout=attn_dropout, ff_dropout=ff_dropout,
            cross_attend=self.has_condition and not cond_as_self_attn_prefix,
            cond_as_self_attn_prefix=cond_as_self_attn_prefix,
            grad_shrink_alpha=grad_shrink_alpha, rel_pos_bias=rel_pos_bias,
            flash_attn=flash_attn, **kwargs,
        )  # fmt: skip
        self.to_logits = nn.Linear(dim, num_semantic_tokens + 1)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``(B, n, dim)`` of ids ``(B, n)``; those of padding (-1) are zero."""
        padding = ids == -1
        embeds: Tensor = self.semantic_embedding(ids.masked_fill(padding, 0))
        return embeds.masked_fill(padding[..., None], 0)

    def positions(self, tokens: int, context: Tensor | None) -> Positions | None:
        """Position bias of a sequence of ``tokens`` tokens (the start token included)."""
        net = self.transformer.rel_pos_bias
        if net is None:
            return None
        offsets = net(tokens)
        zero = offsets.new_zeros(offsets.shape[0], 1)
        codes = torch.arange(tokens, dtype=torch.int32, device=offsets.device)
        front = front_length(self.transformer, context)
        return Positions(
            causal_table(zero, offsets, zero), codes, F.pad(codes, (front, 0), value=-FAR)
        )

    def forward(
        self,
        *,
        ids: Tensor,
        return_loss: bool = False,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        cond_drop_prob: float | None = None,
        unique_consecutive: bool | None = None,
        kv_cache: Tensor | None = None,
        return_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token after the start token and after each token.

        Args:
            ids: ``(B, n)`` semantic tokens, -1 is padding.
            return_loss: leave the last id out.
            text: a text per row, in place of text_embeds.
            text_embeds: ``(B, c, cond_dim)``, the condition.
            self_attn_mask: ``(B, n)`` bool, which ids are seen.
            cond_drop_prob: share of rows without condition; default the model's.
            unique_consecutive: ignored, as in audiolm-pytorch.
            kv_cache: ``(depth, 2, B, cached, dim_head)`` of an earlier call on a beginning of ids.
            return_kv_cache: return the cache too.

        Returns:
            ``(B, 1 + n, num_semantic_tokens + 1)``, with a cache only those after its end.

        Raises:
            ValueError, TypeError: ids or condition are not as above.
        """
        check_ids("ids", ids, (2,))
        context, context_mask = self.condition(ids.shape[0], text, text_embeds, cond_drop_prob)
        logits, cache = self._logits(
            ids[:, :-1] if return_loss else ids, context, context_mask, self_attn_mask, kv_cache,
            return_kv_cache,
        )  # fmt: skip
        return logits if cache is None else (logits, cache.stacked())

    def _logits(
        self, ids: Tensor, context: Tensor | None, context_mask: Tensor | None,
        self_attn_mask: Tensor | None, kv_cache: Tensor | None, keep: bool,
    ) -> tuple[Tensor, Cache | None]:  # fmt: skip
        batch, length = ids.shape[0], ids.shape[1] + 1
        tokens = torch.cat((self.start_token.expand(batch, 1, -1), self.embed(ids)), dim=1)
        if self_attn_mask is not None:
            self_attn_mask = F.pad(self_attn_mask, (1, 0), value=True)
        cache = self.open_cache(kv_cache, batch, length, context, keep)
        held = self.held_tokens(cache, context)
        positions = self.positions(length, context)
        hidden = self.transformer(
            tokens[:, held:], self_attn_mask=self_attn_mask, context=context,
            context_mask=context_mask, cache=cache,
            attn_bias=None if positions is None else positions.part(held, length),
        )  # fmt: skip
        return self.to_logits(hidden), cache

    def forward_with_cond_scale(
        self,
        *,
        ids: Tensor,
        cond_scale: float = 3,
        kv_cache: Tensor | None = None,
        return_kv_cache: bool = False,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        unique_consecutive: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Guided logits, from one forward pass over both halves; see :meth:`forward`.

        ``kv_cache`` is ``(halves, depth, 2, B, cached, dim_head)``.
        """
        check_ids("ids", ids, (2,))
        context, context_mask, halves = self.guided_condition(
            ids.shape[0], text, text_embeds, cond_scale
        )
        mask = None if self_attn_mask is None else twice(self_attn_mask, halves)
        logits, cache = self._logits(
            twice(ids, halves), context, context_mask, mask, split_stacked(kv_cache),
            return_kv_cache,
        )  # fmt: skip
        logits = guide(logits, cond_scale, halves)
        return logits if cache is None else (logits, join_stacked(cache.stacked(), halves))
