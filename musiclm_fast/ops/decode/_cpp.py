"""The C++ kernel of csrc/decode for CPU tensors in float32, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from musiclm_fast import _extension
from musiclm_fast.ops import _compiled
from musiclm_fast.ops.decode.weights import (
    AttentionWeights,
    DecodeWeights,
    FeedForwardWeights,
    MixWeights,
)


def supports(x: Tensor, weights: DecodeWeights, **_: Any) -> tuple[bool, str]:
    """Whether the kernel can take these arguments, and why not."""
    ok, reason = _compiled.supports(x, "cpu", (torch.float32,))
    if ok and torch.is_grad_enabled() and (x.requires_grad or weights.gamma.requires_grad):
        return False, "it has no gradient"
    return ok, reason


def run(x: Tensor, weights: DecodeWeights, keys_values: Tensor, length: int, **call: Any) -> Tensor:
    """Call the kernel; the first call of a set of weights packs them."""
    if "cpp" not in weights.packed:
        with torch.no_grad():
            sizes = _sizes(weights)
            packed = torch.ops.musiclm_fast.decode_pack(_parameters(weights), sizes)
        weights.packed["cpp"] = packed, sizes
    packed, sizes = weights.packed["cpp"]
    table = call["bias_table"]
    out: Tensor = torch.ops.musiclm_fast.decode_step(
        x.contiguous(), packed, keys_values, length, _contiguous(call["context"]),
        _contiguous(call["context_mask"]), None if table is None else table.float().contiguous(),
        _contiguous(call["q_code"]), _contiguous(call["k_codes"]),
        _contiguous(call["key_padding_mask"]), sizes,
    )  # fmt: skip
    return out


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sizes(w: DecodeWeights) -> list[int]:
    norm_context = w.layers[0].own.context_gamma is not None
    return [
        len(w.layers), w.dim, w.heads, w.dim_head, w.hidden, w.streams, w.nulls, int(w.cross),
        int(norm_context), int(w.value_residual),
    ]  # fmt: skip


def _parameters(weights: DecodeWeights) -> list[Tensor]:
    # In the order in which csrc/decode/decode.cpp takes them.
    found: list[Tensor | None] = []
    for layer in weights.layers:
        found += _mix(layer.own_mix)
        own = layer.own
        found += [own.context_gamma, own.context_beta, own.to_kv, own.null_kv, *_queries(own)]
        if layer.cross is not None:
            found += [*_mix(layer.cross_mix), *_queries(layer.cross)]
        found += [*_mix(layer.ff_mix), *_feed_forward(layer.ff)]
    found += [weights.gamma, weights.beta]
    return [x.detach().contiguous() for x in found if x is not None]


def _mix(mix: MixWeights | None) -> list[Tensor | None]:
    return [] if mix is None else [mix.weights, mix.scales, mix.offsets]


def _queries(attention: AttentionWeights) -> list[Tensor | None]:
    return [attention.gamma, attention.beta, attention.to_q, attention.to_out]


def _feed_forward(ff: FeedForwardWeights) -> list[Tensor | None]:
    return [ff.gamma, ff.beta, ff.widen, ff.inner_gamma, ff.inner_beta, ff.narrow]


def _fake_step(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


if _extension.load():
    torch.library.register_fake("musiclm_fast::decode_step")(_fake_step)
