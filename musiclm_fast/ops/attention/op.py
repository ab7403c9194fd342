"""Fused attention with an offset-table position bias: contract, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_dtype,
    check_floating,
    check_ndim,
    check_probability,
    check_same_device,
    check_shape,
    check_tensor,
    describe,
    fail,
)
from musiclm_fast._dispatch import Dispatcher, torch_backend
from musiclm_fast._wording import plural
from musiclm_fast.ops import _compiled, _triton_target
from musiclm_fast.ops.attention import _cpp, _triton
from musiclm_fast.ops.attention.reference import attention_reference


def attention(
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
    backend: str | None = None,
) -> Tensor:
    """Softmax attention with a relative position bias that is read from a table of offsets.

    ::

        q', k' = l2norm(q) * q_scale, l2norm(k) * k_scale        (only if both scales are given)
        s[b, h, i, j] = scale * <q'[b, h, i], k'[b, h, j]>
                        + bias_table[h, R + clamp(q_codes[i] - k_codes[j], -R, R)]
        out = dropout(softmax_j(s over the visible keys)) @ v

    A query that sees no key gives zeros and zero gradients. Only ``"torch"`` holds a tensor of
    M x N.

    Args:
        q: ``(B, H, M, D)`` float32, float64, bfloat16 or float16; any strides.
        k: ``(B, Hkv, N, D)``, same dtype; Hkv divides H (1 is multi-query, H multi-head).
        v: ``(B, Hkv, N, D)``, same dtype.
        bias_table: ``(H, 2R + 1)`` floating, or None for no bias.
        q_codes: ``(M,)`` or ``(B, M)`` int32 position codes of the queries; any values are safe.
        k_codes: ``(N,)`` or ``(B, N)`` int32 position codes of the keys.
        key_padding_mask: ``(B, N)`` bool, True where a key takes part.
        key_lengths: ``(B,)`` int32 or int64; keys at or beyond a sample's length are skipped.
        causal: query i sees keys j <= i + N - M (the last query sees all).
        q_scale: ``(D,)`` floating; with ``k_scale`` it turns on the l2-norm of q and k.
        k_scale: ``(D,)`` floating.
        scale: factor of the similarities; None means ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        dropout_seed: one int64 on q's device; None draws it from the device's generator.
        backend: ``"cpp"``, ``"triton"`` or ``"torch"``; None takes the first that supports the
            call.

    Returns:
        ``(B, H, M, D)`` in q's dtype. Gradients reach q, k, v, bias_table, q_scale and k_scale.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        BackendError: the named backend cannot run this call.

    Sources: https://arxiv.org/abs/2205.14135 (tiling), https://arxiv.org/abs/2010.04245 (QK norm).
    """
    _check(
        q, k, v, bias_table, q_codes, k_codes, key_padding_mask, key_lengths, q_scale, k_scale,
        dropout_p, dropout_seed,
    )  # fmt: skip
    if dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (1,), device=q.device)
    arguments = dict(
        q=q, k=k, v=v, bias_table=bias_table, q_codes=q_codes, k_codes=k_codes,
        key_padding_mask=key_padding_mask, key_lengths=key_lengths, causal=causal,
        q_scale=q_scale, k_scale=k_scale,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        dropout_p=float(dropout_p), dropout_seed=dropout_seed if dropout_p > 0.0 else None,
    )  # fmt: skip
    return dispatcher.select(backend, q.device, **arguments).run(**arguments)


def grid_codes(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Position codes of a height x width grid in row-major order.

    ``code = row * (2 * width - 1) + column``: differences of codes are then unique per offset in
    two dimensions.

    Returns:
        ``(height * width,)`` int32.
    """
    rows = torch.arange(height, dtype=torch.int32, device=device)
    columns = torch.arange(width, dtype=torch.int32, device=device)
    return (rows[:, None] * (2 * width - 1) + columns[None, :]).flatten()


def grid_offsets(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """The (row, column) offset that each column of a grid's bias table stands for.

    The table's radius R is one more than the largest difference of :func:`grid_codes`, so its two
    edge entries are no real offset's.

    Returns:
        ``(2R + 1, 2)`` int64, R = (height - 1) * (2 * width - 1) + width.
    """
    span = 2 * width - 1
    radius = (height - 1) * span + width
    difference = torch.arange(-radius, radius + 1, device=device)
    rows = torch.div(difference + width - 1, span, rounding_mode="floor")
    return torch.stack((rows, difference - rows * span), dim=-1)


def _check(
    q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None, q_codes: Tensor | None,
    k_codes: Tensor | None, key_padding_mask: Tensor | None, key_lengths: Tensor | None,
    q_scale: Tensor | None, k_scale: Tensor | None, dropout_p: float, dropout_seed: Tensor | None,
) -> None:  # fmt: skip
    check_ndim("q", q, 4, "(B, H, M, D)")
    check_dtype("q", q, (torch.float32, torch.float64, torch.bfloat16, torch.float16))
    batch, heads, queries, head_dim = q.shape
    check_shape("k", k, (batch, None, None, head_dim), "(B, Hkv, N, D)")
    check_dtype("k", k, q.dtype)
    kv_heads, keys = k.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        fail("k", plural(kv_heads, "head"), f"a number that divides q's {plural(heads, 'head')}")
    check_shape("v", v, (batch, kv_heads, keys, head_dim), "(B, Hkv, N, D)")
    check_dtype("v", v, q.dtype)

    given = [t is not None for t in (bias_table, q_codes, k_codes)]
    if any(given) and not all(given):
        names = ("bias_table", "q_codes", "k_codes")
        fail(
            "bias_table, q_codes, k_codes",
            " and ".join(n for n, g in zip(names, given, strict=True) if g) + " alone",
            "all three or none",
        )
    if bias_table is not None and q_codes is not None and k_codes is not None:
        check_shape("bias_table", bias_table, (heads, None), "(H, 2R + 1)")
        check_floating("bias_table", bias_table)
        if bias_table.shape[1] % 2 == 0:
            fail("bias_table", describe(bias_table), "an odd number 2R + 1 of columns")
        for name, codes, length in (("q_codes", q_codes, queries), ("k_codes", k_codes, keys)):
            check_ndim(name, codes, (1, 2), "(length,) or (B, length)")
            shape = (length,) if codes.ndim == 1 else (batch, length)
            check_shape(name, codes, shape, "(length,) or (B, length)")
            check_dtype(name, codes, torch.int32)
        if q_codes.ndim != k_codes.ndim:
            fail("k_codes", describe(k_codes), f"as many dimensions as q_codes ({q_codes.ndim})")
    if key_padding_mask is not None:
        check_shape("key_padding_mask", key_padding_mask, (batch, keys), "(B, N)")
        check_dtype("key_padding_mask", key_padding_mask, torch.bool)
    if key_lengths is not None:
        check_shape("key_lengths", key_lengths, (batch,), "(B,)")
        check_dtype("key_lengths", key_lengths, (torch.int32, torch.int64))
    if (q_scale is None) != (k_scale is None):
        fail("q_scale, k_scale", "one of them", "both or none")
    if q_scale is not None and k_scale is not None:
        check_shape("q_scale", q_scale, (head_dim,), "(D,)")
        check_shape("k_scale", k_scale, (head_dim,), "(D,)")
        check_floating("q_scale", q_scale)
        check_floating("k_scale", k_scale)
    check_probability("dropout_p", dropout_p)
    if dropout_seed is not None:
        check_tensor("dropout_seed", dropout_seed)
        check_dtype("dropout_seed", dropout_seed, torch.int64)
        if dropout_seed.numel() != 1:
            fail("dropout_seed", describe(dropout_seed), "one int64")
    check_same_device(
        "q", q, k=k, v=v, bias_table=bias_table, q_codes=q_codes, k_codes=k_codes,
        key_padding_mask=key_padding_mask, key_lengths=key_lengths, q_scale=q_scale,
        k_scale=k_scale, dropout_seed=dropout_seed,
    )  # fmt: skip


dispatcher = Dispatcher(
    "attention",
    [
        _triton_target.triton_backend(_triton.supports, _triton.run, _triton.self_check),
        _compiled.cpp_backend(_cpp.supports, _cpp.run),
        torch_backend(attention_reference),
    ],
)
