"""One more token through all layers in pure torch: definition, fallback and oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast.ops.attention.reference import offset_bias
from musiclm_fast.ops.decode.weights import (
    AttentionWeights,
    DecodeWeights,
    FeedForwardWeights,
    MixWeights,
)


def decode_reference(
    x: Tensor,
    weights: DecodeWeights,
    keys_values: Tensor,
    length: int,
    *,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    bias_table: Tensor | None = None,
    q_code: Tensor | None = None,
    k_codes: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """See :func:`musiclm_fast.ops.decode`."""
    bias = None
    if bias_table is not None and q_code is not None and k_codes is not None:
        bias = offset_bias(bias_table, q_code, k_codes)[0, :, 0].to(x.dtype)[None]  # (1, H, n)
    own_bias = _masked(bias, key_padding_mask, x.dtype)
    context_bias = _masked(None, context_mask, x.dtype)
    streams = x[:, None].expand(-1, weights.streams, -1)  # (B, s, dim)
    first = None
    for index, layer in enumerate(weights.layers):
        x, mixed, beta = _before(streams, layer.own_mix)
        k, v = _keys_values(x, layer.own)
        own_values = v
        if weights.value_residual and first is not None:
            v = (v + first).mul_(0.5)
        first = own_values if first is None else first
        keys, values = keys_values[index]  # (B, capacity, dim_head)
        keys[:, length], values[:, length] = k, v
        k, v = keys[:, : length + 1], values[:, : length + 1]
        if layer.own.null_kv is not None:
            null_k, null_v = layer.own.null_kv[:, None].expand(-1, k.shape[0], -1, -1)
            k, v = torch.cat((null_k, k), dim=1), torch.cat((null_v, v), dim=1)
        out = _attend(x, k, v, layer.own, weights.heads, own_bias, key_padding_mask)
        streams = _after(out, mixed, beta)
        if layer.cross is not None and context is not None:
            x, mixed, beta = _before(streams, layer.cross_mix)
            k, v = context[index]
            out = _attend(x, k, v, layer.cross, weights.heads, context_bias, context_mask)
            streams = _after(out, mixed, beta)
        x, mixed, beta = _before(streams, layer.ff_mix)
        streams = _after(_feed_forward(x, layer.ff), mixed, beta)
    return F.layer_norm(streams.sum(dim=1), (weights.dim,), weights.gamma, weights.beta)


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


def _masked(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # (B or 1, H or 1, n): the bias with -inf where a key is hidden
    if mask is None:
        return bias
    blank = torch.zeros((), dtype=dtype, device=mask.device)
    return (blank if bias is None else bias).masked_fill(~mask[:, None], float("-inf"))


def _before(streams: Tensor, mix: MixWeights | None) -> tuple[Tensor, Tensor, Tensor | None]:
    # branch input (B, dim), mixed streams (B, s, dim) and the output's weights (B, s, 1)
    if mix is None:
        return streams[:, 0], streams, None
    batch, count, dim = streams.shape
    norm = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).clamp_min_(1e-12)
    weight = torch.mm(streams.reshape(-1, dim), mix.weights).view(batch, count, count + 2)
    weight = torch.addcmul(mix.offsets, weight.div_(norm).tanh_(), mix.scales)
    mixed = torch.bmm(weight[..., :-1].transpose(1, 2), streams)  # (B, 1 + s, dim)
    return mixed[:, 0], mixed[:, 1:], weight[..., -1:]


def _after(out: Tensor, mixed: Tensor, beta: Tensor | None) -> Tensor:
    if beta is None:
        return mixed + out[:, None]
    return torch.addcmul(mixed, beta, out[:, None])


def _keys_values(x: Tensor, attention: AttentionWeights) -> tuple[Tensor, Tensor]:
    assert attention.to_kv is not None
    if attention.context_gamma is not None:
        x = F.layer_norm(x, x.shape[-1:], attention.context_gamma, attention.context_beta)
    k, v = linear(x, attention.to_kv).chunk(2, dim=-1)
    return k, v


def _attend(
    x: Tensor, k: Tensor, v: Tensor, attention: AttentionWeights, heads: int, bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    # x (B, dim), k and v (B, n, d), bias (B or 1, H or 1, n) -> (B, dim). All heads share the keys:
    # a row's heads are the rows of one product, which reads the keys once.
    q = linear(F.layer_norm(x, x.shape[-1:], attention.gamma, attention.beta), attention.to_q)
    q = q.view(q.shape[0], heads, q.shape[1] // heads)
    scale = q.shape[-1] ** -0.5
    if bias is None:
        sim = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    else:
        sim = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    weight = sim.softmax(dim=-1)
    if mask is not None:
        weight = weight.masked_fill_(~mask.any(dim=-1)[:, None, None], 0.0)
    return linear(torch.bmm(weight, v).flatten(1), attention.to_out)


def _feed_forward(x: Tensor, ff: FeedForwardWeights) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], ff.gamma, ff.beta)
    if _transposed(x, ff.widen):
        value, gate = torch.mm(ff.widen, x.t()).chunk(2)  # (hidden, B)
        hidden = F.gelu(gate).mul_(value).t()
    else:
        value, gate = F.linear(x, ff.widen).chunk(2, dim=-1)
        hidden = F.gelu(gate).mul_(value)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], ff.inner_gamma, ff.inner_beta)
    return linear(hidden, ff.narrow)
