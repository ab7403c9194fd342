"""One more token through a transformer's layers: contract, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_dtype,
    check_floating,
    check_same_device,
    check_shape,
    describe,
    fail,
)
from musiclm_fast._dispatch import Dispatcher, torch_backend
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.decode import _cpp
from musiclm_fast.ops.decode.reference import decode_reference
from musiclm_fast.ops.decode.weights import DecodeWeights


def decode(
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
    backend: str | None = None,
) -> Tensor:
    """Run one token per row through all layers of a multi-query transformer with a cache.

    ::

        streams = x, s times
        per layer, for self attention, cross attention (where there is one) and feed-forward:
            w[t]       = scales * tanh(<streams[t], weights> / |streams[t]|) + offsets[t]
            input      = sum_t w[t, 0] streams[t]
            streams[u] = sum_t w[t, 1 + u] streams[t] + w[u, -1] branch(input)
        out = layer_norm(sum_t streams[t])

    With one stream and no mix a branch's output is added to the stream. Queries see the normed
    input; similarities are scaled by ``dim_head ** -0.5`` and have the bias that
    :func:`musiclm_fast.ops.attention` reads from a table by codes. A row that sees no key gets
    zeros from that attention. In C++ the first call with ``weights`` packs them into one copy, and
    a row's result does not depend on the other rows.

    Args:
        x: ``(B, dim)`` floating, the token's embedding.
        weights: of all layers; they must not change after the first call.
        keys_values: ``(depth, 2, B, capacity, dim_head)`` contiguous, x's dtype: keys and values of
            ``length`` earlier tokens. This token's are written at ``length``.
        length: tokens held, less than capacity.
        context: ``(depth, 2, B, c, dim_head)``, keys and values of the cross attention (null keys
            included), where there is one.
        context_mask: ``(B, c)`` bool, which of them are seen; None for all.
        bias_table: ``(H, 2R + 1)`` floating, or None for no bias.
        q_code: ``(1,)`` int32, the token's position code.
        k_codes: ``(n,)`` int32 of all keys, n = null keys + length + 1.
        key_padding_mask: ``(B, n)`` bool, which keys are seen; None for all.
        backend: ``"cpp"`` or ``"torch"``; None takes the first that supports the call.

    Returns:
        ``(B, dim)``. ``"cpp"`` has no gradient and refuses a call that needs one.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value is not as above.
        BackendError: the named backend cannot run this call.

    Sources: https://arxiv.org/abs/1911.02150 (multi-query attention),
    https://arxiv.org/abs/2409.19606 (hyper-connections), https://arxiv.org/abs/2410.17897 (value
    residual).
    """
    _check(
        x, weights, keys_values, length, context, context_mask, bias_table, q_code, k_codes,
        key_padding_mask,
    )  # fmt: skip
    arguments = dict(
        x=x, weights=weights, keys_values=keys_values, length=length, context=context,
        context_mask=context_mask, bias_table=bias_table, q_code=q_code, k_codes=k_codes,
        key_padding_mask=key_padding_mask,
    )  # fmt: skip
    return dispatcher.select(backend, x.device, **arguments).run(**arguments)


def _check(
    x: Tensor, weights: DecodeWeights, keys_values: Tensor, length: int, context: Tensor | None,
    context_mask: Tensor | None, bias_table: Tensor | None, q_code: Tensor | None,
    k_codes: Tensor | None, key_padding_mask: Tensor | None,
) -> None:  # fmt: skip
    check_shape("x", x, (None, weights.dim), "(B, dim)")
    check_floating("x", x)
    check_dtype("weights", weights.gamma, x.dtype)
    rows, depth, dim_head = x.shape[0], len(weights.layers), weights.dim_head
    check_shape(
        "keys_values", keys_values, (depth, 2, rows, None, dim_head),
        "(depth, 2, B, capacity, dim_head)",
    )  # fmt: skip
    check_dtype("keys_values", keys_values, x.dtype)
    if not keys_values.is_contiguous():
        fail("keys_values", f"strides {keys_values.stride()}", "a contiguous tensor")
    if not 0 <= length < keys_values.shape[3]:
        fail("length", length, f"at least 0 and less than the capacity {keys_values.shape[3]}")
    if (context is not None) != weights.cross:
        fail("context", "None" if context is None else describe(context),
             "keys and values exactly where the layers have cross attention")  # fmt: skip
    if context is not None:
        check_shape("context", context, (depth, 2, rows, None, dim_head),
                    "(depth, 2, B, c, dim_head)")  # fmt: skip
        check_dtype("context", context, x.dtype)
    if context_mask is not None:
        if context is None:
            fail("context_mask", describe(context_mask), "None where there is no context")
        check_shape("context_mask", context_mask, (rows, context.shape[3]), "(B, c)")
        check_dtype("context_mask", context_mask, torch.bool)
    keys = weights.nulls + length + 1
    given = [t is not None for t in (bias_table, q_code, k_codes)]
    if any(given) and not all(given):
        fail("bias_table, q_code, k_codes", "some of them", "all three or none")
    if bias_table is not None and q_code is not None and k_codes is not None:
        check_shape("bias_table", bias_table, (weights.heads, None), "(H, 2R + 1)")
        check_floating("bias_table", bias_table)
        if bias_table.shape[1] % 2 == 0:
            fail("bias_table", describe(bias_table), "an odd number 2R + 1 of columns")
        check_shape("q_code", q_code, (1,), "(1,)")
        check_shape("k_codes", k_codes, (keys,), "(n,)")
        check_dtype("q_code", q_code, torch.int32)
        check_dtype("k_codes", k_codes, torch.int32)
    if key_padding_mask is not None:
        check_shape("key_padding_mask", key_padding_mask, (rows, keys), "(B, n)")
        check_dtype("key_padding_mask", key_padding_mask, torch.bool)
    check_same_device(
        "x", x, weights=weights.gamma, keys_values=keys_values, context=context,
        context_mask=context_mask, bias_table=bias_table, q_code=q_code, k_codes=k_codes,
        key_padding_mask=key_padding_mask,
    )  # fmt: skip


dispatcher = Dispatcher(
    "decode",
    [
        _compiled.cpp_backend(_cpp.supports, _cpp.run),
        torch_backend(decode_reference),
    ],
)
