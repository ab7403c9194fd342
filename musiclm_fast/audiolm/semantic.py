"""First stage: a transformer over semantic tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.positions import FAR, Positions, causal_table
from musiclm_fast.audiolm.stage import Stage
from musiclm_fast.audiolm.token_ids import check_ids
from musiclm_fast.audiolm.transformer import front_length


class SemanticTransformer(Stage):
    """Transformer over semantic tokens, with upstream's arguments and ``state_dict``.

    Source: AudioLM, https://arxiv.org/abs/2209.03143.

    Args:
        dim: width.
        num_semantic_tokens: clusters of the semantic tokenizer.
        **shared: see :class:`musiclm_fast.audiolm.stage.Stage`.
    """

    namespace = "semantic"
    _id_dims = (2,)

    def __init__(
        self,
        *,
        dim: int,
        num_semantic_tokens: int,
        **shared: Any,
    ) -> None:
        super().__init__(dim=dim, **shared)
        check_positive_int("num_semantic_tokens", num_semantic_tokens)
        self.num_semantic_tokens = num_semantic_tokens
        self.start_token = nn.Parameter(torch.randn(dim))
        self.semantic_embedding = nn.Embedding(num_semantic_tokens + 1, dim)
        self.eos_id = num_semantic_tokens
        self._add_transformer()
        self.to_logits = nn.Linear(dim, num_semantic_tokens + 1)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings ``(B, n, dim)`` of ids ``(B, n)``, zero for padding (-1)."""
        padding = ids == -1
        embeds: Tensor = self.semantic_embedding(ids.masked_fill(padding, 0))
        return embeds.masked_fill(padding[..., None], 0)

    def positions(self, tokens: int, context: Tensor | None) -> Positions | None:
        """Position bias of ``tokens`` tokens (the start token included)."""
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
            self_attn_mask: ``(B, n)`` bool, True for ids that are seen.
            cond_drop_prob: share of rows without condition; default the model's.
            unique_consecutive: ignored, as upstream does.
            kv_cache: ``(depth, 2, B, cached, dim_head)`` of an earlier call on a prefix of ids.
            return_kv_cache: return the cache too.

        Returns:
            ``(B, 1 + n, num_semantic_tokens + 1)``; with a cache, those after its end only.

        Raises:
            ValueError, TypeError: ids or condition do not match the above.
        """
        check_ids("ids", ids, (2,))
        return self._result(
            ids[:, :-1] if return_loss else ids, text, text_embeds, self_attn_mask, kv_cache,
            return_kv_cache, cond_drop_prob=cond_drop_prob,
        )  # fmt: skip

    def _result(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        (_, logits), caches = self._run({"ids": ids}, *args, **kwargs)
        return logits if caches is None else (logits, caches[0])

    def _read(
        self, ids: Sequence[Tensor], self_attn_mask: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Positions | None]:
        start = self.start_token.expand(ids[0].shape[0], 1, -1)
        tokens = torch.cat((start, self.embed(ids[0])), dim=1)
        if self_attn_mask is not None:
            self_attn_mask = F.pad(self_attn_mask, (1, 0), value=True)
        return tokens, self_attn_mask, self.positions(tokens.shape[1], context)

    def _logits(self, hidden: Tensor, first: int, only_own: bool) -> tuple[None, Tensor]:
        return None, self.to_logits(hidden)

    def embed_next(self, ids: Tensor, index: int) -> Tensor:
        embeds: Tensor = self.semantic_embedding(ids)
        return embeds

    def next_logits(self, hidden: Tensor, index: int) -> Tensor:
        logits: Tensor = self.to_logits(hidden)
        return logits

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
        """Guided logits from one forward pass over both halves; see :meth:`forward`.

        ``kv_cache`` is ``(halves, depth, 2, B, cached, dim_head)``.
        """
        return self._result(
            ids, text, text_embeds, self_attn_mask, kv_cache, return_kv_cache, cond_scale=cond_scale
        )
