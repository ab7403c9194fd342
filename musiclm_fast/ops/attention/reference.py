"""Attention in pure torch: the definition, the fallback and the oracle of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_fast._dispatch import without_autocast

_MASK32 = 0xFFFFFFFF


def offset_index(q_codes: Tensor, k_codes: Tensor, radius: int) -> Tensor:
    """Index into the bias table for every pair of a query and a key.

    ``radius + clamp(q_code - k_code, -radius, radius)``; the difference is taken in int64, because
    a difference of two int32 can wrap.

    Args:
        q_codes: ``(M,)`` or ``(B, M)`` int32.
        k_codes: ``(N,)`` or ``(B, N)`` int32.
        radius: R, where the table has 2R + 1 columns.

    Returns:
        ``(M, N)`` or ``(B, M, N)`` int64 in [0, 2R].
    """
    offset = q_codes.long().unsqueeze(-1) - k_codes.long().unsqueeze(-2)
    return offset.clamp(-radius, radius) + radius


def offset_bias(table: Tensor, q_codes: Tensor, k_codes: Tensor) -> Tensor:
    """Materialise the bias: ``(1, H, M, N)``, or ``(B, H, M, N)`` where codes are per sample."""
    index = offset_index(q_codes, k_codes, table.shape[-1] // 2)
    bias = table[:, index]  # (H, M, N) or (H, B, M, N)
    return bias.unsqueeze(0) if bias.ndim == 3 else bias.transpose(0, 1)


def _mix32(x: Tensor) -> Tensor:
    # MurmurHash3's 32-bit finaliser on int64 tensors that hold uint32 values.
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def dropout_keep(
    seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout_p: float
) -> Tensor:
    """Which attention weights survive dropout, as a pure function of seed and position.

    With ``row = (b * heads + h) * queries + i`` in uint32 and the seed's two halves lo and hi::

        row_key = mix32(mix32(row ^ lo) ^ hi)
        keep    = mix32(row_key + j * 0x9E3779B9) >= floor(dropout_p * 2**32)

    mix32 is MurmurHash3's finaliser. Every backend computes this same function, so the backward
    pass and activation checkpointing replay it from the seed, and backends agree exactly.

    Args:
        seed: one int64.
        batch, heads, queries, keys: the sizes of the attention matrix.
        dropout_p: probability of dropping a weight.

    Returns:
        ``(batch, heads, queries, keys)`` bool.
    """
    device = seed.device
    low = seed.reshape(()) & _MASK32
    high = (seed.reshape(()) >> 32) & _MASK32
    row = torch.arange(batch * heads * queries, device=device) & _MASK32
    row_key = _mix32(_mix32(row ^ low) ^ high)
    column = (torch.arange(keys, device=device) * 0x9E3779B9) & _MASK32
    bits = _mix32((row_key[:, None] + column[None, :]) & _MASK32)
    return (bits >= int(dropout_p * 2**32)).view(batch, heads, queries, keys)


@without_autocast
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias_table: Tensor | None = None,
    q_codes: Tensor | None = None,
    k_codes: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    upcast: bool = True,
) -> Tensor:
    """Same arguments and result as :func:`musiclm_fast.ops.attention`, with M x N memory.

    Computes in float32 (float64 for float64 inputs); ``upcast=False`` computes in the inputs'
    dtype, the yardstick for a kernel's error in half precision.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    compute = q.dtype
    if upcast:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype = q.dtype
    q, k, v = (t.to(compute) for t in (q, k, v))
    if q_scale is not None and k_scale is not None:
        q = F.normalize(q, dim=-1) * q_scale.to(compute)
        k = F.normalize(k, dim=-1) * k_scale.to(compute)
    if kv_heads != heads:
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))

    scale = head_dim**-0.5 if scale is None else scale
    sim = q @ k.transpose(-1, -2) * scale  # (B, H, M, N)
    if bias_table is not None:
        assert q_codes is not None and k_codes is not None
        sim = sim + offset_bias(bias_table.to(compute), q_codes, k_codes)

    visible: Tensor | None = None  # broadcasts to (B, H, M, N)
    if key_padding_mask is not None:
        visible = key_padding_mask[:, None, None, :]
    if key_lengths is not None:
        in_length = torch.arange(keys, device=q.device) < key_lengths[:, None]
        in_length = in_length[:, None, None, :]
        visible = in_length if visible is None else visible & in_length
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        visible = seen if visible is None else visible & seen
    if visible is not None:
        sim = sim.masked_fill(~visible, -torch.finfo(compute).max)

    weights = sim.softmax(dim=-1)
    if visible is not None:
        # Where a query sees no key softmax is uniform: such rows are zero, with zero gradients.
        weights = weights.masked_fill(~visible, 0.0)
    if dropout_p > 0.0:
        assert dropout_seed is not None
        keep = dropout_keep(dropout_seed, batch, heads, queries, keys, dropout_p)
        weights = weights * keep / (1.0 - dropout_p)
    return (weights @ v).to(out_dtype)
