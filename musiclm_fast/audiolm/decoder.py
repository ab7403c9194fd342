"""Single-token forward pass of a stage's transformer, for generation.

It equals :meth:`.transformer.Transformer.forward` on one token per row, and runs on
:func:`musiclm_fast.ops.decode`, whose time is bounded by reading the weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from musiclm_fast.audiolm.cache import Cache
from musiclm_fast.audiolm.positions import Positions
from musiclm_fast.audiolm.transformer import Transformer
from musiclm_fast.ops import decode
from musiclm_fast.ops.decode import (
    AttentionWeights,
    DecodeWeights,
    FeedForwardWeights,
    LayerWeights,
    MixWeights,
)


class TokenDecoder:
    """A transformer prepared for one token per row; built once per generation.

    Args:
        transformer: in eval mode. Its parameters must not change during use.
        positions: of all tokens, or None for no position bias.
    """

    def __init__(self, transformer: Transformer, positions: Positions | None) -> None:
        self.weights = decode_weights(transformer)
        self.positions = positions

    def __call__(self, x: Tensor, index: int, mask: Tensor | None, cache: Cache) -> Tensor:
        """Run all layers for one more token per row.

        Args:
            x: ``(B, dim)``.
            index: the token's place in the sequence.
            mask: ``(B, n)`` bool over null keys, prefix, cached tokens and this token; None if all
                are seen.
            cache: of the earlier tokens; this token is added.

        Returns:
            ``(B, dim)``.
        """
        bias = None if self.positions is None else self.positions.part(index, index + 1)
        context, context_mask = cache.stacked_context()
        hidden = decode(
            x, self.weights, cache.keys_values, cache.length,
            context=context, context_mask=context_mask,
            bias_table=None if bias is None else bias.table,
            q_code=None if bias is None else bias.q_codes,
            k_codes=None if bias is None else bias.k_codes,
            key_padding_mask=mask,
        )  # fmt: skip
        cache.advance(1)
        return hidden


def decode_weights(transformer: Transformer) -> DecodeWeights:
    """The transformer's parameters in the layout of :func:`musiclm_fast.ops.decode`."""
    layers: Any = transformer.layers
    return DecodeWeights(
        layers=tuple(
            LayerWeights(
                own_mix=_mix(own),
                own=_attention(own.branch, keys=True),
                cross_mix=None if cross is None else _mix(cross),
                cross=None if cross is None else _attention(cross.branch, keys=False),
                ff_mix=_mix(ff),
                ff=_feed_forward(ff.branch),
            )
            for own, cross, ff in layers
        ),
        gamma=transformer.norm.gamma,
        beta=transformer.norm.beta,
        heads=transformer.heads,
        streams=transformer.num_residual_streams,
        value_residual=transformer.add_value_residual,
    )


def _mix(connection: Any) -> MixWeights | None:
    constants = connection.constants()
    return None if constants is None else MixWeights(*constants)


def _attention(attention: Any, keys: bool) -> AttentionWeights:
    norm = attention.context_norm if keys and hasattr(attention.context_norm, "gamma") else None
    return AttentionWeights(
        gamma=attention.norm.gamma,
        beta=attention.norm.beta,
        to_q=attention.to_q.weight,
        to_out=attention.to_out[0].weight,
        to_kv=attention.to_kv.weight if keys else None,
        context_gamma=None if norm is None else norm.gamma,
        context_beta=None if norm is None else norm.beta,
        null_kv=attention.null_kv if keys else None,
    )


def _feed_forward(ff: Any) -> FeedForwardWeights:
    return FeedForwardWeights(
        gamma=ff[0].gamma,
        beta=ff[0].beta,
        widen=ff[1].weight,
        inner_gamma=ff[3].gamma,
        inner_beta=ff[3].beta,
        narrow=ff[5].weight,
    )
