"""The text tower."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_dtype, check_ndim, check_shape, describe, fail
from musiclm_fast.models.arguments import record_arguments
from musiclm_fast.nn.transformer import LayerNorm, Transformer
from musiclm_fast.tokenizer import tokenizer


class TextTransformer(nn.Module):
    """Transformer over CLIP's byte-pair tokens, read out at a class token.

    Args:
        dim: width of the transformer.
        depth: number of blocks.
        num_tokens: size of the vocabulary.
        max_seq_len: longest text in tokens.
        dim_head, heads, attn_dropout, ff_dropout, ff_mult: of the transformer.
        pad_id: token that takes no part (where no mask is given).
    """

    arguments: dict[str, Any]
    _said_cut = False

    @record_arguments
    def __init__(
        self,
        dim: int,
        depth: int,
        num_tokens: int = tokenizer.vocab_size,
        max_seq_len: int = 256,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        ff_mult: float = 4,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        if depth < 1:
            fail("depth", depth, "at least 1")
        self.dim = dim
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        self.depth = depth
        self.max_seq_len = max_seq_len
        self.cls_token = nn.Parameter(torch.randn(dim))
        self.transformer = Transformer(
            dim=dim, depth=depth, dim_head=dim_head, heads=heads, attn_dropout=attn_dropout,
            ff_dropout=ff_dropout, ff_mult=ff_mult,
        )  # fmt: skip
        self.pad_id = pad_id
        self.norm = LayerNorm(dim)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.cls_token.device

    def forward(
        self,
        x: Tensor | None = None,
        raw_texts: list[str] | None = None,
        mask: Tensor | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed texts, given as token ids or as strings.

        Args:
            x: ``(B, n)`` integer token ids.
            raw_texts: B strings, which the CLIP tokenizer encodes; longer ones than
                ``max_seq_len`` tokens are truncated, with one warning.
            mask: ``(B, n)`` bool, True where a token takes part; None is ``x != pad_id``. The
                class token always takes part.
            return_all_layers: also return the outputs of all blocks but the last.

        Returns:
            ``(B, dim)``; with ``return_all_layers`` also ``(depth - 1, B, n + 1, dim)``.

        Raises:
            ValueError, TypeError: both or none of x and raw_texts, wrong shape or dtype, an empty
                batch, ids out of range (checked on CPU tensors), a sequence that is too long.
        """
        if (x is None) == (raw_texts is None):
            fail("x, raw_texts", "both" if x is not None else "neither", "exactly one of them")
        if raw_texts is not None:
            x = self._tokens(raw_texts).to(self.device)
        assert x is not None
        self._check(x)
        if mask is None:
            mask = x != self.pad_id
        check_shape("mask", mask, tuple(x.shape), "of x")
        check_dtype("mask", mask, torch.bool)

        tokens = self.token_emb(x) + self.pos_emb.weight[: x.shape[1]]
        cls = self.cls_token.expand(x.shape[0], 1, -1)
        tokens = torch.cat((cls.to(tokens.dtype), tokens), dim=1)  # (B, 1 + n, dim)
        mask = F.pad(mask, (1, 0), value=True)
        tokens, layers = self.transformer(
            tokens, mask=mask, return_all_layers=return_all_layers, last_queries=1
        )
        out = self.norm(tokens[:, 0])
        return (out, layers) if return_all_layers else out

    def _tokens(self, raw_texts: list[str]) -> Tensor:
        # (B, n <= max_seq_len); texts that are cut are warned about once, not once per batch
        most = self.max_seq_len
        x = tokenizer.tokenize(raw_texts, context_length=most + 1, truncate_text=True)
        if x.shape[1] > most and not self._said_cut:
            self._said_cut = True
            warnings.warn(
                f"raw_texts: texts of more than max_seq_len = {most} tokens are cut (said once)",
                stacklevel=3,
            )
        return x[:, :most]

    def _check(self, x: Tensor) -> None:
        check_ndim("x", x, 2, "(B, n) of token ids")
        check_dtype("x", x, (torch.int64, torch.int32))
        if x.shape[0] == 0:
            fail("x", "an empty batch", "at least one text")
        if x.shape[1] > self.max_seq_len:
            fail("x", describe(x), f"at most max_seq_len = {self.max_seq_len} tokens")
        if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
            low, high = (int(v) for v in x.aminmax())
            if low < 0 or high >= self.token_emb.num_embeddings:
                bad = low if low < 0 else high
                fail("x", f"token id {bad}", f"ids from 0 to {self.token_emb.num_embeddings - 1}")
