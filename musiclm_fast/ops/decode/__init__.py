from musiclm_fast.ops.decode.op import decode
from musiclm_fast.ops.decode.reference import decode_reference
from musiclm_fast.ops.decode.weights import (
    AttentionWeights,
    DecodeWeights,
    FeedForwardWeights,
    LayerWeights,
    MixWeights,
)

__all__ = [
    "AttentionWeights",
    "DecodeWeights",
    "FeedForwardWeights",
    "LayerWeights",
    "MixWeights",
    "decode",
    "decode_reference",
]
