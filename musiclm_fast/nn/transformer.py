"""The transformer that both towers share: upstream's parameters, on the fused attention op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


_ALIGNED = 16  # values in a cache line of float32; matrix units want 8 or more


_MANY_ROWS = 512  # below, padding the weights costs more than aligned products gain


def width_padding(hidden: int, x: Tensor) -> int:
    """Padding of a hidden width for an input ``(..., dim)``: 0 for few rows."""
    return -hidden % _ALIGNED if x.shape[:-1].numel() >= _MANY_ROWS else 0


def pad_halves(weight: Tensor, padding: int) -> Tensor:
    """``(2 * hidden, dim)`` with ``padding`` rows of zeros after each half."""
    return F.pad(weight.unflatten(0, (2, -1)), (0, 0, 0, padding)).flatten(0, 1)


class FeedForward(nn.Sequential):
    """Pre-norm GEGLU feed-forward with hidden width ``int(dim * mult * 2 / 3)``.

    That width is odd at dim 512, and rows of 1,365 values are unaligned. Long inputs are computed
    on a width of a multiple of 16, with weights padded by zeros in each call: equal outputs and
    gradients, and the parameters keep their shapes.
    """

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0) -> None:
        hidden = int(dim * mult * 2 / 3)
        super().__init__(
            LayerNorm(dim),
            nn.Linear(dim, hidden * 2, bias=False),
            GEGLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        up, down = self[1], self[4]
        if not (is_plain(up) and is_plain(down)):
            return cast(Tensor, super().forward(x))
        hidden: int = down.weight.shape[1]
        padding = width_padding(hidden, x)
        if padding == 0:
            return cast(Tensor, super().forward(x))
        widen = pad_halves(up.weight, padding)
        x = self[3](self[2](F.linear(self[0](x), widen)))
        return F.linear(x, F.pad(down.weight, (0, padding)))


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A plain Linear, not a subclass such as an adapter's, without hooks."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer) is nn.Linear and not hooks


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
        queries: int | None = None,
    ) -> Tensor:
        """Attend within each sample.

        Args:
            x: ``(B, n, dim)``.
            bias: position bias, or None.
            mask: ``(B, n)`` bool, True where a token takes part.
            lengths: ``(B,)`` tokens of each sample; those beyond take no part.
            queries: how many of the first tokens attend (to all); None is all. With
                fewer, there is no bias.

        Returns:
            ``(B, queries, dim)``.
        """
        x = self.norm(x)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        q = self.to_q(x if queries is None else x[:, :queries])
        # (B, n, h * d) -> (B, h, n, d): views, which the kernels take as they are
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
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


def _run_block(
    block: nn.Module,
    x: Tensor,
    bias: OffsetBias | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    queries: int | None,
) -> Tensor:
    attn, ff = block.children()
    attended = attn(x, bias=bias, mask=mask, lengths=lengths, queries=queries)
    x = attended + (x if queries is None else x[:, :queries])
    out: Tensor = ff(x) + x
    return out


class Transformer(nn.Module):
    """A stack of attention and feed-forward blocks with residuals.

    With ``checkpoint_blocks`` set, the backward pass recomputes each block's forward instead of
    storing its activations; dropout is replayed. https://arxiv.org/abs/1604.06174
    """

    checkpoint_blocks = False

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
        last_queries: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run all blocks; arguments as in :class:`Attention`.

        Args:
            return_all_layers: also return the outputs of all blocks but the last.
            last_queries: how many of the first tokens the last block computes; None is all.
                The block computes only keys and values of the others.

        Returns:
            The last block's output ``(B, last_queries, dim)`` and, where asked for, all earlier
            blocks' outputs ``(depth - 1, B, n, dim)``, else None.
        """
        again = self.checkpoint_blocks and torch.is_grad_enabled()
        inputs = []
        last = len(self.layers) - 1
        for index, block in enumerate(self.layers):
            if return_all_layers:
                inputs.append(x)
            arguments = (block, x, bias, mask, lengths, last_queries if index == last else None)
            if again:
                x = checkpoint(_run_block, *arguments, use_reentrant=False)
            else:
                x = _run_block(*arguments)
        if not return_all_layers:
            return x, None
        # A block's input is the output of the one before.
        return x, torch.stack(inputs[1:]) if last else x.new_empty(0, *inputs[0].shape)
