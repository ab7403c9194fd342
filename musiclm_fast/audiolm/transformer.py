"""The transformer of the three stages: upstream's parameters on the fused attention.

A forward pass computes one position table for all layers and reads it through offset codes. It
never allocates a tensor with one value per pair of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast.audiolm.cache import Cache
from musiclm_fast.audiolm.hyper_connections import HyperConnection, Residual, Streams
from musiclm_fast.nn.transformer import GEGLU, OffsetBias, is_plain, pad_halves, width_padding
from musiclm_fast.ops import attention, geglu_norm


def grad_shrink(x: Tensor, alpha: float = 0.1) -> Tensor:
    """``x`` with its gradient scaled by ``alpha``. CogView, https://arxiv.org/abs/2105.13290"""
    return x if alpha == 1.0 or not x.requires_grad else x * alpha + x.detach() * (1 - alpha)


class LayerNorm(nn.Module):
    """LayerNorm with a learned scale and a fixed zero shift."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class RelativePositionBias(nn.Module):
    """A position bias per head as an MLP of the offset. https://arxiv.org/abs/2111.09883"""

    def __init__(self, *, dim: int, heads: int, layers: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.net = nn.ModuleList([nn.Sequential(nn.Linear(1, dim), nn.SiLU())])
        for _ in range(layers - 1):
            self.net.append(nn.Sequential(nn.Linear(dim, dim), nn.SiLU()))
        self.net.append(nn.Linear(dim, heads))

    def forward(self, length: int) -> Tensor:
        """Bias of the offsets 0 to length - 1; a causal transformer needs no others.

        Returns:
            ``(heads, length)``.
        """
        weight = next(self.net.parameters())
        x = torch.arange(length, device=weight.device, dtype=weight.dtype)[:, None]
        for layer in self.net:
            x = layer(x)
        return x.t()


class FeedForward(nn.Sequential):
    """Pre-norm GEGLU feed-forward with a normed hidden layer of width ``dim * mult * 2 / 3``.

    For long inputs the hidden width is padded to a multiple of 16, as in
    :class:`musiclm_fast.nn.transformer.FeedForward`.
    """

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.1) -> None:
        hidden = int(dim * 2 * mult / 3)
        super().__init__(
            LayerNorm(dim),
            nn.Linear(dim, hidden * 2, bias=False),
            GEGLU(),
            LayerNorm(hidden),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        modules: Any = list(self)
        norm, widen, _, inner_norm, dropout, narrow = modules
        plain = all(is_plain(layer) for layer in (widen, narrow))
        # With padding, dropout would draw a mask of another width.
        drops = self.training and dropout.p > 0
        padding = width_padding(inner_norm.gamma.shape[0], x) if plain and not drops else 0
        if padding:
            x = F.linear(norm(x), pad_halves(widen.weight, padding))
        else:
            x = widen(norm(x))
        x = dropout(geglu_norm(x, inner_norm.gamma, inner_norm.beta))
        out: Tensor = F.linear(x, F.pad(narrow.weight, (0, padding))) if padding else narrow(x)
        return out


class Attention(nn.Module):
    """Multi-query attention: all query heads share one head of keys and values.

    Queries are projected from the normed input, keys and values from the raw input or the context.
    The bias of null keys and of a prefix is zero.
    """

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        dim_head: int = 64,
        dim_context: int | None = None,
        heads: int = 8,
        norm_context: bool = False,
        num_null_kv: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        dim_context = dim if dim_context is None else dim_context
        self.norm = LayerNorm(dim)
        self.context_norm = LayerNorm(dim_context) if norm_context else nn.Identity()
        self.num_null_kv = num_null_kv
        self.null_kv = (
            nn.Parameter(torch.randn(2, num_null_kv, dim_head)) if num_null_kv > 0 else None
        )
        self.to_q = nn.Linear(dim, dim_head * heads, bias=False)
        self.to_kv = nn.Linear(dim_context, dim_head * 2, bias=False)
        self.to_out = nn.Sequential(
            nn.Linear(dim_head * heads, dim, bias=False), nn.Dropout(dropout)
        )

    def keys_values(
        self, source: Tensor, value_residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and the values before the residual, ``(B, n, dim_head)`` each.

        Value residual: the mean with the first layer's values. https://arxiv.org/abs/2410.17897
        """
        k, own = self.to_kv(self.context_norm(source)).chunk(2, dim=-1)
        v = own if value_residual is None else 0.5 * (own + value_residual)
        return k, v, own

    def with_null(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask with the null keys in front."""
        if self.null_kv is None:
            return k, v, mask
        null_k, null_v = self.null_kv[:, None].expand(-1, k.shape[0], -1, -1).to(k.dtype)
        mask = None if mask is None else F.pad(mask, (self.num_null_kv, 0), value=True)
        return torch.cat((null_k, k), dim=1), torch.cat((null_v, v), dim=1), mask

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: OffsetBias | None
    ) -> Tensor:
        """Attend from ``x`` ``(B, m, dim)`` to keys ``(B, n, dim_head)``; ``(B, m, dim)``."""
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = attention(
            q, k[:, None], v[:, None],
            bias_table=None if bias is None else bias.table,
            q_codes=None if bias is None else bias.q_codes,
            k_codes=None if bias is None else bias.k_codes,
            key_padding_mask=mask,
            causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected


class Transformer(nn.Module):
    """Causal transformer with multi-query attention, residual streams and value residuals.

    Args:
        dim: width.
        depth: layers.
        heads: heads of the queries.
        dim_context: width of the condition, default ``dim``.
        cross_attend: each layer attends to the condition.
        attn_dropout, ff_dropout: dropout of attention weights and outputs, of hidden units.
        grad_shrink_alpha: the input's gradient is scaled by this.
        cond_as_self_attn_prefix: prepend the condition to the keys and values of the sequence.
        rel_pos_bias: add a :class:`RelativePositionBias`.
        flash_attn: no position bias, as in upstream.
        add_value_residual: average the values with those of the first layer.
        num_residual_streams: streams of the hyper-connections; 1 is a plain residual.
        dim_head: width of a head.
        norm_context, num_null_kv: of the self attention; see :class:`Attention`.
        scale: ignored, as upstream does; similarities are scaled by ``dim_head ** -0.5``.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        dim_context: int | None = None,
        cross_attend: bool = False,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        grad_shrink_alpha: float = 0.1,
        cond_as_self_attn_prefix: bool = False,
        rel_pos_bias: bool = True,
        flash_attn: bool = False,
        add_value_residual: bool = True,
        num_residual_streams: int = 4,
        dim_head: int = 64,
        norm_context: bool = False,
        num_null_kv: int = 0,
        scale: float = 8,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("depth", depth), ("heads", heads)):
            check_positive_int(name, value)
        check_positive_int("num_residual_streams", num_residual_streams)
        if cross_attend and cond_as_self_attn_prefix:
            fail("cond_as_self_attn_prefix", True, "False where cross_attend is True")
        if cross_attend and (norm_context or num_null_kv):
            fail("norm_context, num_null_kv", "given", "their defaults where cross_attend is True")
        self.dim_context = dim if dim_context is None else dim_context
        self.heads, self.dim_head = heads, dim_head
        self.num_null_kv = num_null_kv
        self.cross_attend = cross_attend
        self.cond_as_self_attn_prefix = cond_as_self_attn_prefix
        self.grad_shrink_alpha = grad_shrink_alpha
        self.add_value_residual = add_value_residual
        self.num_residual_streams = num_residual_streams
        self.layers = nn.ModuleList()
        self.rel_pos_bias = (
            RelativePositionBias(dim=dim // 2, heads=heads)
            if rel_pos_bias and not flash_attn
            else None
        )

        def connect(branch: nn.Module) -> nn.Module:
            if num_residual_streams == 1:
                return Residual(branch)
            return HyperConnection(num_residual_streams, dim=dim, branch=branch)

        def attend(causal: bool, **options: Any) -> nn.Module:
            attn = Attention(
                dim=dim, heads=heads, dropout=attn_dropout, dim_head=dim_head, causal=causal,
                **options,
            )  # fmt: skip
            return connect(attn)

        for _ in range(depth):
            own = attend(True, norm_context=norm_context, num_null_kv=num_null_kv)
            cross = None
            if cross_attend:
                cross = attend(False, dim_context=dim_context, num_null_kv=1, norm_context=True)
            ff = connect(FeedForward(dim=dim, dropout=ff_dropout))
            self.layers.append(nn.ModuleList([own, cross, ff]))  # type: ignore[list-item]
        self.norm = LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        *,
        self_attn_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_bias: OffsetBias | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            x: ``(B, m, dim)``, the tokens that are not in the cache.
            self_attn_mask: ``(B, n)`` bool over all tokens (cached ones first, without prefix and
                null keys), True for tokens that are seen.
            context: ``(B, c, dim_context)``, the condition.
            context_mask: ``(B, c)`` bool.
            attn_bias: position bias; its key codes cover null keys, prefix and all tokens.
            cache: keys and values of earlier tokens. This call appends to it.

        Returns:
            ``(B, m, dim)``.

        Raises:
            ValueError: a condition is missing or of another width.
        """
        attends_to_context = self.cross_attend or self.cond_as_self_attn_prefix
        if attends_to_context and context is None:
            fail("context", None, "a condition: this transformer is conditioned")
        if context is not None and context.shape[-1] != self.dim_context:
            fail("context", f"a condition of width {context.shape[-1]}", f"{self.dim_context}")
        prefix = context if self.cond_as_self_attn_prefix else None
        starts = cache is None or cache.length == 0
        mask = self._self_attn_mask(x, self_attn_mask, prefix, context_mask, cache)

        x = grad_shrink(x, self.grad_shrink_alpha)
        streams = Streams(x[:, :, None].expand(-1, -1, self.num_residual_streams, -1))
        first_values = first_cross_values = None
        layers: Any = self.layers
        for index, (self_attn, cross_attn, ff) in enumerate(layers):
            x, streams = self_attn.width(streams, self_attn.constants())
            branch = self_attn.branch
            source = x if prefix is None or not starts else torch.cat((prefix, x), dim=1)
            k, v, values = branch.keys_values(source, first_values)
            if self.add_value_residual and first_values is None:
                first_values = values
            if cache is not None:
                k, v = cache.append(index, k, v)
            k, v, _ = branch.with_null(k, v, None)
            streams = self_attn.depth(branch.attend(x, k, v, mask, attn_bias), streams)

            if cross_attn is not None:
                x, streams = cross_attn.width(streams, cross_attn.constants())
                branch = cross_attn.branch
                if cache is not None and index < len(cache.context):
                    k, v, cross_mask = cache.context[index]
                else:
                    k, v, values = branch.keys_values(context, first_cross_values)
                    if self.add_value_residual and first_cross_values is None:
                        first_cross_values = values
                    k, v, cross_mask = branch.with_null(k, v, context_mask)
                    if cache is not None:
                        cache.context.append((k, v, cross_mask))
                streams = cross_attn.depth(branch.attend(x, k, v, cross_mask, None), streams)

            x, streams = ff.width(streams, ff.constants())
            streams = ff.depth(ff.branch(x), streams)
        if cache is not None:
            cache.advance()
        normed: Tensor = self.norm(streams.total())
        return normed

    def _self_attn_mask(
        self, x: Tensor, mask: Tensor | None, prefix: Tensor | None,
        prefix_mask: Tensor | None, cache: Cache | None,
    ) -> Tensor | None:  # fmt: skip
        # (B, null + prefix + tokens), or None if every key is seen
        front = 0 if prefix is None else prefix.shape[1]
        if mask is None and (prefix is None or prefix_mask is None):
            return None
        if mask is None:
            held = 0 if cache is None else max(cache.length - front, 0)
            mask = x.new_ones(x.shape[0], held + x.shape[1], dtype=torch.bool)
        if prefix_mask is not None and prefix is not None:
            mask = torch.cat((prefix_mask, mask), dim=1)
        elif front:
            mask = F.pad(mask, (front, 0), value=True)
        return F.pad(mask, (self.num_null_kv, 0), value=True) if self.num_null_kv else mask


def front_length(transformer: Transformer, context: Tensor | None) -> int:
    """Number of keys before the tokens: null keys and the prefix."""
    prefix = transformer.cond_as_self_attn_prefix and context is not None
    return transformer.num_null_kv + (context.shape[1] if prefix and context is not None else 0)
