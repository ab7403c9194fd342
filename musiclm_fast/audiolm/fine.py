"""Third stage: a transformer over fine acoustic tokens that follow the coarse ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int
from musiclm_fast.audiolm.acoustic import AcousticStage, Caches, Logits
from musiclm_fast.audiolm.positions import FAR, Positions
from musiclm_fast.audiolm.token_ids import per_quantizer_logits
from musiclm_fast.audiolm.transformer import front_length


class FineTransformer(AcousticStage):
    """Transformer over coarse, then fine tokens, with upstream's arguments and ``state_dict``.

    Source: AudioLM, https://arxiv.org/abs/2209.03143.

    Args:
        num_coarse_quantizers, num_fine_quantizers: the codec's quantizers, in two groups.
        codebook_size: entries of each codebook.
        dim: width.
        project_coarse_logits: also predict the coarse tokens.
        pad_id: coarse ids with this value are masked.
        rel_pos_bias: learned bias of each (time, quantizer) offset.
        flash_attn: as in upstream, no position bias.
        centred_pos_bias: the bias MLP sees the offset itself, so that an offset's bias does not
            depend on the length. False is upstream's behaviour: the MLP sees offset + length - 1.
            Weights that were trained that way need it.
        **shared: see :class:`musiclm_fast.audiolm.stage.Stage`.
    """

    namespace = "fine"

    def __init__(
        self,
        *,
        num_coarse_quantizers: int,
        num_fine_quantizers: int,
        codebook_size: int,
        dim: int,
        project_coarse_logits: bool = True,
        pad_id: int = -1,
        rel_pos_bias: bool = True,
        flash_attn: bool = False,
        centred_pos_bias: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(dim=dim, rel_pos_bias=False, flash_attn=flash_attn, **shared)
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
        self._add_transformer()
        heads = self.transformer.heads
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

    def embed_coarse(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The start token and the embeddings of ids ``(B, n)``, and their mask ``(B, n)``."""
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
        """Position bias of ``coarse`` and ``fine`` tokens (start tokens excluded).

        A token's code is ``time * (2 * quantizers - 1) + quantizer``, so a difference identifies
        one offset in time and quantizer. Start tokens have codes far right as queries and far left
        as keys: every pair with a start token selects the table's right edge, the null bias. The
        prefix is right of every query and selects the left edge, zero.
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
    ) -> Logits | tuple[Logits, Caches]:
        """Logits of each next token.

        Args:
            coarse_token_ids: ``(B, c)`` interleaved, or ``(B, steps, quantizers)``. Padding and
                end tokens are masked.
            fine_token_ids: ``(B, f)``, or ``(B, steps, quantizers)``.
            text: a text per row, in place of text_embeds.
            text_embeds: ``(B, n, cond_dim)``, the condition.
            cond_drop_prob: share of rows without condition; default the model's.
            self_attn_mask: ``(B, c + f + 2)`` bool, True for tokens that are seen.
            kv_cache: ``(depth, 2, B, cached, dim_head)`` of an earlier call on a prefix.
            embed_cache: ``(B, cached, dim)``, that call's outputs.
            return_cache: also return the keys and values and the outputs.
            return_only_fine_logits: None for the coarse ones.

        Returns:
            Coarse logits ``(B, c, codebook_size)`` and fine ones ``(B, f + 1, codebook_size)``.

        Raises:
            ValueError, TypeError: ids or condition do not match the above.
        """
        return self._result(
            dict(coarse_token_ids=coarse_token_ids, fine_token_ids=fine_token_ids),
            text, text_embeds, self_attn_mask, kv_cache, return_cache, embed_cache=embed_cache,
            only_own=return_only_fine_logits, cond_drop_prob=cond_drop_prob,
        )  # fmt: skip

    def _read(
        self, ids: Sequence[Tensor], self_attn_mask: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Positions | None]:
        coarse, seen = self.embed_coarse(ids[0])
        fine = self.embed_fine(ids[1])
        mask = F.pad(seen, (1, fine.shape[1]), value=True)
        if self_attn_mask is not None:
            mask = mask & self_attn_mask
        positions = self.positions(ids[0].shape[1], ids[1].shape[1], context)
        return torch.cat((coarse, fine), dim=1), mask, positions

    def _first_logits(self, hidden: Tensor) -> Tensor | None:
        weights = self.coarse_logit_weights
        return None if weights is None else per_quantizer_logits(weights, hidden)

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
    ) -> Logits | tuple[Logits, Caches]:
        """Guided logits from one forward pass over both halves; see :meth:`forward`.

        The first dimension of the caches is the halves.
        """
        return self._result(
            dict(coarse_token_ids=coarse_token_ids, fine_token_ids=fine_token_ids),
            text, text_embeds, self_attn_mask, kv_cache, return_kv_cache, embed_cache=embed_cache,
            only_own=return_only_fine_logits, cond_scale=cond_scale,
        )  # fmt: skip
