"""What :func:`musiclm_fast.ops.decode` reads of a transformer, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MixWeights:
    """How a connection mixes s residual streams.

    Args:
        weights: ``(dim, s + 2)``: of the branch's input, the s mixed streams and the output.
        scales: ``(s + 2,)``.
        offsets: ``(s, s + 2)``.
    """

    weights: Tensor
    scales: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """Multi-query attention: H heads of queries, one of keys and values.

    Args:
        gamma, beta: ``(dim,)``, the queries' norm.
        to_q: ``(H * dim_head, dim)``.
        to_out: ``(dim, H * dim_head)``.
        to_kv: ``(2 * dim_head, dim)``; None for cross attention, whose keys are given.
        context_gamma, context_beta: ``(dim,)``, the norm before ``to_kv``, or None.
        null_kv: ``(2, nulls, dim_head)``, keys and values that stand in front, or None.
    """

    gamma: Tensor
    beta: Tensor
    to_q: Tensor
    to_out: Tensor
    to_kv: Tensor | None = None
    context_gamma: Tensor | None = None
    context_beta: Tensor | None = None
    null_kv: Tensor | None = None


@dataclass(frozen=True)
class FeedForwardWeights:
    """Pre-norm GEGLU with a norm of the hidden layer.

    Args:
        gamma, beta: ``(dim,)``.
        widen: ``(2 * hidden, dim)``: values, then gates.
        inner_gamma, inner_beta: ``(hidden,)``.
        narrow: ``(dim, hidden)``.
    """

    gamma: Tensor
    beta: Tensor
    widen: Tensor
    inner_gamma: Tensor
    inner_beta: Tensor
    narrow: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Mixes are None for one plain stream; cross attention is optional."""

    own_mix: MixWeights | None
    own: AttentionWeights
    cross_mix: MixWeights | None
    cross: AttentionWeights | None
    ff_mix: MixWeights | None
    ff: FeedForwardWeights


@dataclass(frozen=True)
class DecodeWeights:
    """All layers and the last norm. The tensors must not change once they have been used.

    Args:
        layers: all with the same sizes and the same optional parts.
        gamma, beta: ``(dim,)``, the last norm.
        heads: H.
        streams: s.
        value_residual: average values with the first layer's.
    """

    layers: tuple[LayerWeights, ...]
    gamma: Tensor
    beta: Tensor
    heads: int
    streams: int
    value_residual: bool
    # Each backend's packed copy of the tensors, by its name.
    packed: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dim(self) -> int:
        """Width."""
        return self.gamma.shape[0]

    @property
    def dim_head(self) -> int:
        """Width of a head."""
        return self.layers[0].own.to_q.shape[0] // self.heads

    @property
    def hidden(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return self.layers[0].ff.narrow.shape[1]

    @property
    def nulls(self) -> int:
        """Null keys of the self attention."""
        null_kv = self.layers[0].own.null_kv
        return 0 if null_kv is None else null_kv.shape[1]

    @property
    def cross(self) -> bool:
        """Whether the layers attend to a context."""
        return self.layers[0].cross is not None
