"""The transformer that both towers share: the reference's parameters, on the fused attention op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast.ops import attention


@dataclass(frozen=True)
class OffsetBias:
    """A relative position bias as a table of offsets.

    Args:
        table: ``(heads, 2R + 1)``.
        q_codes, k_codes: ``(n,)`` or ``(B, n)`` int32, see :func:`musiclm_fast.ops.attention`.
    """

    table: Tensor
    q_codes: Tensor
    k_codes: Tensor


class LayerNorm(nn.Module):
    """LayerNorm without a bias; with ``scale=False`` without any parameter."""

    def __init__(self, dim: int, scale: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.learned_gamma = nn.Parameter(torch.ones(dim)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.learned_gamma)


class GEGLU(nn.Module):
    """``x * gelu(gate)`` of the two halves of the last axis. https://arxiv.org/abs/2002.05202"""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * x


def FeedForward(dim: int, mult: float = 4, dropout: float = 0.0) -> nn.Sequential:
    """Pre-norm GEGLU feed-forward with hidden width ``int(dim * mult * 2 / 3)``."""
    hidden = int(dim * mult * 2 / 3)
    return nn.Sequential(
        LayerNorm(dim),
        nn.Linear(dim, hidden * 2, bias=False),
        GEGLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, dim, bias=False),
    )


class Attention(nn.Module):
    """Pre-norm multi-head attention with l2-normed queries and keys.

    Similarities are ``scale * <l2norm(q) * q_scale, l2norm(k) * k_scale>`` plus the bias.
    https://arxiv.org/abs/2302.05442
    """

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        scale: float = 8,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.causal = causal
        inner_dim = dim_head * heads
        self.norm = LayerNorm(dim)
        self.attn_dropout = nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, inner_dim * 2, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim, bias=False), nn.Dropout(dropout))

    def forward(
        self,
        x: Tensor,
        bias: OffsetBias | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Attend within each sample.

        Args:
            x: ``(B, n, dim)``.
            bias: position bias, or None.
            mask: ``(B, n)`` bool, True where a token takes part.
            lengths: ``(B,)`` tokens of each sample; those beyond take no part.

        Returns:
            ``(B, n, dim)``.
        """
        x = self.norm(x)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        # (B, n, h * d) -> (B, h, n, d): views, which the kernels take as they are
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), k, v))
        out = attention(
            q, k, v,
            bias_table=None if bias is None else bias.table,
            q_codes=None if bias is None else bias.q_codes,
            k_codes=None if bias is None else bias.k_codes,
            key_padding_mask=mask,
            key_lengths=lengths,
            causal=self.causal,
            q_scale=self.q_scale,
            k_scale=self.k_scale,
            scale=self.scale,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
        )  # fmt: skip
        merged: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return merged


class Transformer(nn.Module):
    """A stack of attention and feed-forward blocks with residuals."""

    def __init__(
        self,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(dim=dim, dim_head=dim_head, heads=heads, dropout=attn_dropout),
                    FeedForward(dim=dim, mult=ff_mult, dropout=ff_dropout),
                ]
            )
            for _ in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        bias: OffsetBias | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        return_all_layers: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run all blocks; arguments as in :class:`Attention`.

        Returns:
            The last block's output ``(B, n, dim)`` and, where asked for, all earlier blocks'
            outputs ``(depth - 1, B, n, dim)``, else None.
        """
        outputs = []
        for block in self.layers:
            attn, ff = block.children()
            x = attn(x, bias=bias, mask=mask, lengths=lengths) + x
            x = ff(x) + x
            outputs.append(x)
        if not return_all_layers:
            return x, None
        return x, torch.stack(outputs[:-1]) if len(outputs) > 1 else x.new_empty(0, *x.shape)
