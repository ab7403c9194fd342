"""Third stage: a transformer over fine acoustic tokens that follow the coarse ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.positions import FAR, Positions, interleaved_offsets
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


class FineTransformer(Stage):
    """Transformer over coarse, then fine tokens; arguments and ``state_dict`` of audiolm-pytorch.

    Source: AudioLM, https://arxiv.org/abs/2209.03143.

    Args:
        num_coarse_quantizers, num_fine_quantizers: the codec's quantizers, in two groups.
        codebook_size: entries of each codebook.
        dim: width.
        depth: layers.
        project_coarse_logits: predict the coarse tokens too.
        pad_id: coarse ids of this value are not seen.
        rel_pos_bias: bias of each (time, quantizer) offset.
        centred_pos_bias: the bias MLP sees the offset itself, so that an offset's bias is the same
            at any length. False is audiolm-pytorch's: it sees offset + length - 1, and weights
            that were trained so need it so.
        heads, attn_dropout, ff_dropout, cond_as_self_attn_prefix, grad_shrink_alpha, flash_attn,
        **kwargs: see :class:`musiclm_fast.audiolm.transformer.Transformer`.
        t5_name, cond_dim, has_condition, audio_text_condition, cond_drop_prob, drop_text_embeds:
            see :class:`musiclm_fast.audiolm.stage.Stage`.
    """

    def __init__(
        self,
        *,
        num_coarse_quantizers: int,
        num_fine_quantizers: int,
        codebook_size: int,
        dim: int,
        depth: int,
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
        project_coarse_logits: bool = True,
        pad_id: int = -1,
        rel_pos_bias: bool = True,
        flash_attn: bool = False,
        drop_text_embeds: bool = False,
        centred_pos_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dim=dim, t5_name=t5_name, cond_dim=cond_dim, has_condition=has_condition,
            audio_text_condition=audio_text_condition, cond_drop_prob=cond_drop_prob,
            drop_text_embeds=drop_text_embeds,
        )  # fmt: skip
        check_positive_int("num_coarse_quantizers", num_coarse_quantizers)
        check_positive_int("num_fine_quantizers", num_fine_quantizers)
        check_positive_int("codebook_size", codebook_size)
        self.num_coarse_quantizers = num_coarse_quantizers
        self.num_fine_quantizers = num_fine_quantizers
        self.codebook_size = codebook_size
        self.centred_pos_bias = centred_pos_bias
        self.coarse_start_token = nn.Parameter(torch.randn(dim))
        self.fine_start_token = nn.Parameter(torch.randn(dim))
        self.coarse_embedding = nn.Embedding(num_coarse_quantizers * codebook_size, dim)
        self.fine_embedding = nn.Embedding(num_fine_quantizers * codebook_size, dim)
        self.coarse_quantize_embedding = nn.Embedding(num_coarse_quantizers, dim)
        self.fine_quantize_embedding = nn.Embedding(num_fine_quantizers, dim)
        self.pad_id = pad_id
        self.eos_id = codebook_size
        self.proj_text_embed = self._text_projection()
        self.transformer = Transformer(
            dim=dim, depth=depth, heads=heads, attn_dropout=attn_dropout, ff_dropout=ff_dropout,
            cross_attend=self.has_condition and not cond_as_self_attn_prefix,
            cond_as_self_attn_prefix=cond_as_self_attn_prefix, rel_pos_bias=False,
            grad_shrink_alpha=grad_shrink_alpha, flash_attn=flash_attn, **kwargs,
        )  # fmt: skip
        has_bias = rel_pos_bias and not flash_attn
        self.null_pos_bias = nn.Parameter(torch.randn(heads, 1, 1)) if has_bias else None
        hidden = dim // 2
        self.pos_bias_mlp = (
            nn.Sequential(
                nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, heads),
            )
            if has_bias
            else None
        )  # fmt: skip
        self.coarse_logit_weights = (
            nn.Parameter(torch.randn(num_coarse_quantizers, codebook_size, dim))
            if project_coarse_logits
            else None
        )
        self.fine_logit_weights = nn.Parameter(torch.randn(num_fine_quantizers, codebook_size, dim))

    def _embed(
        self, ids: Tensor, start: Tensor, codes: nn.Embedding, quantizers: nn.Embedding
    ) -> Tensor:
        length = ids.shape[1]
        offsets = interleaved_offsets(quantizers.num_embeddings, length, ids.device)
        embeds = codes(ids + self.codebook_size * offsets)
        embeds = embeds + quantizer_embedding(quantizers.weight, length)
        return torch.cat((start.expand(ids.shape[0], 1, -1), embeds), dim=1)

    def embed_coarse(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The start token and the embeddings of ids ``(B, n)``, and which are seen ``(B, n)``."""
        seen = (ids != self.pad_id) & (ids != self.eos_id)
        ids = ids.masked_fill(~seen, 0)
        return (
            self._embed(
                ids, self.coarse_start_token, self.coarse_embedding, self.coarse_quantize_embedding
            ),
            seen,
        )

    def embed_fine(self, ids: Tensor) -> Tensor:
        """The start token and the embeddings of ids ``(B, n)``; ``(B, 1 + n, dim)``."""
        return self._embed(
            ids, self.fine_start_token, self.fine_embedding, self.fine_quantize_embedding
        )

    def positions(self, coarse: int, fine: int, context: Tensor | None) -> Positions | None:
        """Position bias of so many coarse and fine tokens (start tokens excluded).

        A token's code is ``time * (2 * quantizers - 1) + quantizer``, so that differences are
        unique per offset in time and quantizer. Start tokens are far right as queries and far left
        as keys: every pair with one falls on the table's right edge, the null bias. The prefix is
        further right than any query: it falls on the left edge, zero.
        """
        if self.pos_bias_mlp is None or self.null_pos_bias is None:
            return None
        device = self.null_pos_bias.device
        coarse_quantizers, fine_quantizers = self.num_coarse_quantizers, self.num_fine_quantizers
        quantizers = coarse_quantizers + fine_quantizers
        steps = max(-(-coarse // coarse_quantizers), -(-fine // fine_quantizers), 1)
        span = 2 * quantizers - 1

        shift = (1 - steps, 1 - quantizers) if self.centred_pos_bias else (0, 0)
        inputs = torch.cartesian_prod(
            torch.arange(2 * steps - 1, device=device) + shift[0],
            torch.arange(span, device=device) + shift[1],
        )
        biases: Tensor = self.pos_bias_mlp(inputs.to(self.null_pos_bias.dtype))
        zero = self.null_pos_bias.new_zeros(self.null_pos_bias.shape[0], 1)
        table = torch.cat((zero, biases.t(), self.null_pos_bias[:, 0]), dim=1)

        def codes(length: int, group: int, first: int) -> Tensor:
            index = torch.arange(length, dtype=torch.int32, device=device)
            return index // group * span + index % group + first

        segments = (
            codes(coarse, coarse_quantizers, 0),
            codes(fine, fine_quantizers, coarse_quantizers),
        )
        q_codes = torch.cat([F.pad(segment, (1, 0), value=FAR) for segment in segments])
        k_codes = torch.cat([F.pad(segment, (1, 0), value=-FAR) for segment in segments])
        front = front_length(self.transformer, context)
        return Positions(table, q_codes, F.pad(k_codes, (front, 0), value=3 * FAR))

    def forward(
        self,
        coarse_token_ids: Tensor,
        fine_token_ids: Tensor,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        cond_drop_prob: float | None = None,
        self_attn_mask: Tensor | None = None,
        kv_cache: Tensor | None = None,
        embed_cache: Tensor | None = None,
        return_cache: bool = False,
        return_only_fine_logits: bool = False,
    ) -> Logits | tuple[Logits, tuple[Tensor, Tensor]]:
        """Logits of each next token.

        Args:
            coarse_token_ids: ``(B, c)`` interleaved, or ``(B, steps, quantizers)``; padding and
                end tokens are not seen.
            fine_token_ids: ``(B, f)``, or ``(B, steps, quantizers)``.
            text: a text per row, in place of text_embeds.
            text_embeds: ``(B, n, cond_dim)``, the condition.
            cond_drop_prob: share of rows without condition; default the model's.
            self_attn_mask: ``(B, c + f + 2)`` bool, which tokens are seen.
            kv_cache: ``(depth, 2, B, cached, dim_head)`` of an earlier call on a beginning.
            embed_cache: ``(B, cached, dim)``, that call's outputs.
            return_cache: return keys and values and the outputs too.
            return_only_fine_logits: None for the coarse ones.

        Returns:
            Coarse logits ``(B, c, codebook_size)`` and fine ones ``(B, f + 1, codebook_size)``.

        Raises:
            ValueError, TypeError: ids or condition are not as above.
        """
        check_ids("coarse_token_ids", coarse_token_ids, (2, 3))
        context, context_mask = self.condition(
            coarse_token_ids.shape[0], text, text_embeds, cond_drop_prob
        )
        logits, caches = self._logits(
            coarse_token_ids, fine_token_ids, context, context_mask, self_attn_mask,
            return_only_fine_logits, kv_cache, embed_cache, return_cache,
        )  # fmt: skip
        return logits if caches is None else (logits, caches)

    def _logits(
        self, coarse_token_ids: Tensor, fine_token_ids: Tensor, context: Tensor | None,
        context_mask: Tensor | None, self_attn_mask: Tensor | None, only_fine: bool,
        kv_cache: Tensor | None, embed_cache: Tensor | None, keep: bool,
    ) -> tuple[Logits, tuple[Tensor, Tensor] | None]:  # fmt: skip
        check_ids("fine_token_ids", fine_token_ids, (2, 3))
        coarse, seen = self.embed_coarse(coarse_token_ids.flatten(1))
        fine = self.embed_fine(fine_token_ids.flatten(1))
        tokens = torch.cat((coarse, fine), dim=1)
        batch, length = tokens.shape[:2]
        mask = F.pad(seen, (1, fine.shape[1]), value=True)
        if self_attn_mask is not None:
            mask = mask & self_attn_mask
        cache = self.open_cache(kv_cache, batch, length, context, keep)
        held = self.held_tokens(cache, context)
        positions = self.positions(coarse.shape[1] - 1, fine.shape[1] - 1, context)
        hidden = self.transformer(
            tokens[:, held:], self_attn_mask=mask, context=context, context_mask=context_mask,
            cache=cache, attn_bias=None if positions is None else positions.part(held, length),
        )  # fmt: skip
        if embed_cache is not None:
            hidden = torch.cat((embed_cache, hidden), dim=1)
        split = coarse.shape[1]
        coarse_logits = None
        if self.coarse_logit_weights is not None and not only_fine:
            coarse_logits = per_quantizer_logits(self.coarse_logit_weights, hidden[:, : split - 1])
        logits = (coarse_logits, per_quantizer_logits(self.fine_logit_weights, hidden[:, split:]))
        return logits, None if cache is None else (cache.stacked(), hidden)

    def forward_with_cond_scale(
        self,
        coarse_token_ids: Tensor,
        fine_token_ids: Tensor,
        cond_scale: float = 3,
        return_kv_cache: bool = False,
        kv_cache: Tensor | None = None,
        embed_cache: Tensor | None = None,
        text: list[str] | None = None,
        text_embeds: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
        return_only_fine_logits: bool = False,
    ) -> Logits | tuple[Logits, tuple[Tensor, Tensor]]:
        """Guided logits, from one forward pass over both halves; see :meth:`forward`.

        The caches have a first dimension for the halves.
        """
        check_ids("coarse_token_ids", coarse_token_ids, (2, 3))
        context, context_mask, halves = self.guided_condition(
            coarse_token_ids.shape[0], text, text_embeds, cond_scale
        )
        (coarse, fine), caches = self._logits(
            twice(coarse_token_ids, halves), twice(fine_token_ids, halves), context, context_mask,
            None if self_attn_mask is None else twice(self_attn_mask, halves),
            return_only_fine_logits, split_stacked(kv_cache),
            None if embed_cache is None else embed_cache.flatten(0, 1), return_kv_cache,
        )  # fmt: skip
        logits = (
            None if coarse is None else guide(coarse, cond_scale, halves),
            guide(fine, cond_scale, halves),
        )
        if caches is None:
            return logits
        kept, hidden = caches
        return logits, (
            join_stacked(kept, halves),
            hidden.unflatten(0, (2 if halves else 1, -1)),
        )
