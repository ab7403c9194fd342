"""One more token through all layers: what generation does a thousand times.

It computes what :meth:`musiclm_fast.audiolm.layers.Transformer.forward` does for a single token,
from a flat plan of the layers' weights: at one token per row the weights' way through memory is
all that may cost, and modules, copies and small operations cost as much again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast.audiolm.cache import Cache


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for the few rows of a step.

    A CPU's matrix product of 2 rows takes about twice as long as that of the transposes, and for
    3 or 4 rows of a wide output it is similar; from there on the plain product is quicker.
    """
    if _transposed(x, weight):
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight)


def _transposed(x: Tensor, weight: Tensor) -> bool:
    rows, wide = x.shape[0], weight.shape[0] >= weight.shape[1]
    return x.device.type == "cpu" and (rows == 2 or (wide and 2 < rows <= 4))


class Mix:
    """A connection's residual streams before and after its branch."""

    def __init__(self, connection: Any) -> None:
        self.constants = connection.constants()

    def before(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Branch input ``(B, dim)``, mixed streams and their weights, from ``(B, s, dim)``."""
        if self.constants is None:
            return streams[:, 0], streams, None
        weights, scales, offsets = self.constants
        batch, count, dim = streams.shape
        length = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_min_(1e-12)
        mix = torch.mm(streams.reshape(-1, dim), weights).view(batch, count, -1)
        mix = torch.addcmul(offsets, mix.div_(length).tanh_(), scales)
        mixed = torch.bmm(mix[..., :-1].transpose(1, 2), streams)  # (B, 1 + s, dim)
        return mixed[:, 0], mixed[:, 1:], mix[..., -1:]

    @staticmethod
    def after(out: Tensor, mixed: Tensor, beta: Tensor | None) -> Tensor:
        """The streams with the branch's output ``(B, dim)``."""
        if beta is None:
            return mixed + out[:, None]
        return torch.addcmul(mixed, beta, out[:, None])


class _Attention:
    def __init__(self, attention: Any) -> None:
        self.module = attention
        self.norm = (attention.norm.gamma, attention.norm.beta)
        self.to_q, self.to_out = attention.to_q.weight, attention.to_out[0].weight
        self.to_kv = attention.to_kv.weight
        self.heads = attention.heads
        self.scale = (self.to_q.shape[0] // self.heads) ** -0.5
        self.dim = self.to_q.shape[1]

    def attend(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # x (B, dim), k and v (B, n, d), bias (B or 1, heads or 1, n) -> (B, dim). All heads share
        # the keys: a row's heads are the rows of one product, which reads the keys once.
        gamma, beta = self.norm
        q = linear(F.layer_norm(x, (self.dim,), gamma, beta), self.to_q)
        q = q.view(q.shape[0], self.heads, -1)
        keys = k.transpose(1, 2)
        if bias is None:
            sim = torch.bmm(q, keys).mul_(self.scale)
        else:
            sim = torch.baddbmm(bias, q, keys, alpha=self.scale)
        out = torch.bmm(sim.softmax(dim=-1), v)
        return linear(out.view(out.shape[0], -1), self.to_out)

    def keys_values(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        source = self.module.context_norm(x)
        k, own = linear(source, self.to_kv).chunk(2, dim=-1)
        v = own if first is None else (own + first).mul_(0.5)
        return k, v, own


class _FeedForward:
    def __init__(self, ff: Any) -> None:
        self.norm = (ff[0].gamma, ff[0].beta)
        self.inner_norm = (ff[3].gamma, ff[3].beta)
        self.widen, self.narrow = ff[1].weight, ff[5].weight
        self.dim, self.hidden = self.narrow.shape

    def __call__(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (self.dim,), *self.norm)
        if _transposed(x, self.widen):
            value, gate = torch.mm(self.widen, x.t()).chunk(2)  # (hidden, B)
            hidden = F.gelu(gate).mul_(value).t()
        else:
            value, gate = F.linear(x, self.widen).chunk(2, dim=-1)
            hidden = F.gelu(gate).mul_(value)
        return linear(F.layer_norm(hidden, (self.hidden,), *self.inner_norm), self.narrow)


class Stepper:
    """A transformer, laid out for one token per row; built once per generation.

    Args:
        transformer: in eval mode. Its parameters must not change while this is used.
    """

    def __init__(self, transformer: Any) -> None:
        self.streams = transformer.num_residual_streams
        self.add_value_residual = transformer.add_value_residual
        self.norm = transformer.norm
        self.layers: list[tuple[Any, ...]] = []
        for own, cross, ff in transformer.layers:
            self.layers.append(
                (
                    Mix(own), _Attention(own.branch),
                    None if cross is None else (Mix(cross), _Attention(cross.branch)),
                    Mix(ff), _FeedForward(ff.branch),
                )
            )  # fmt: skip

    def __call__(self, x: Tensor, bias: Tensor | None, cache: Cache) -> Tensor:
        """Run all layers for one more token per row.

        Args:
            x: ``(B, dim)``.
            bias: ``(B or 1, heads or 1, n)`` of the token and all keys: null keys, prefix, cached
                tokens and itself; -inf where a key is not seen.
            cache: of the earlier tokens; this one is added.

        Returns:
            ``(B, dim)``.
        """
        streams = x[:, None].expand(-1, self.streams, -1)
        first = None
        for index, (self_mix, self_attn, crossing, ff_mix, ff) in enumerate(self.layers):
            x, mixed, beta = self_mix.before(streams)
            k, v, own = self_attn.keys_values(x, first)
            if self.add_value_residual and first is None:
                first = own
            k, v = cache.append(index, k[:, None], v[:, None])
            if self_attn.module.num_null_kv:
                k, v, _ = self_attn.module.with_null(k, v, None)
            streams = Mix.after(self_attn.attend(x, k, v, bias), mixed, beta)
            if crossing is not None:
                cross_mix, cross_attn = crossing
                x, mixed, beta = cross_mix.before(streams)
                k, v, mask = cache.context[index]
                context_bias = cache.context_bias(mask, v.dtype)
                streams = Mix.after(cross_attn.attend(x, k, v, context_bias), mixed, beta)
            x, mixed, beta = ff_mix.before(streams)
            streams = Mix.after(ff(x), mixed, beta)
        cache.advance()
        normed: Tensor = self.norm(streams.sum(dim=1))
        return normed
