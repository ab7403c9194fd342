"""The ops: one line per op. Each folder holds its contract (op.py), definition (reference.py)
and kernels.

attention         softmax attention with an offset-table position bias
decode            one more token per row through a transformer's layers, with a cache
geglu_norm        gated unit of a feed-forward and the norm after it
hyper_connection  residual streams: adding a branch's output and mixing for the next one
spectrogram       power or log-mel STFT with stretch, masks and cropping in one pass
contrastive_loss  softmax, decoupled and sigmoid losses between two sets of latents
"""

from musiclm_fast._dispatch import BackendError, read_environment, use_backend
from musiclm_fast.ops.attention import attention, grid_codes, grid_offsets
from musiclm_fast.ops.contrastive import contrastive_loss, distributed_contrastive_loss
from musiclm_fast.ops.decode import decode
from musiclm_fast.ops.geglu_norm import geglu_norm
from musiclm_fast.ops.hyper_connection import hyper_connection
from musiclm_fast.ops.spectrogram import mel_filters, spectrogram

read_environment()

__all__ = [
    "BackendError",
    "attention",
    "contrastive_loss",
    "decode",
    "distributed_contrastive_loss",
    "geglu_norm",
    "grid_codes",
    "grid_offsets",
    "hyper_connection",
    "mel_filters",
    "spectrogram",
    "use_backend",
]
