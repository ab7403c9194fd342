"""The ops: one line per op. Each folder holds its contract (op.py), definition (reference.py)
and kernels.

attention         softmax attention with an offset-table position bias
decode            one more token per row through a transformer's layers, with a cache
spectrogram       power or log-mel STFT with stretch, masks and cropping in one pass
contrastive_loss  softmax, decoupled and sigmoid losses between two sets of latents
"""

from musiclm_fast._dispatch import BackendError, read_environment, use_backend
from musiclm_fast.ops.attention import attention, grid_codes, grid_offsets
from musiclm_fast.ops.contrastive import contrastive_loss, distributed_contrastive_loss
from musiclm_fast.ops.decode import decode
from musiclm_fast.ops.spectrogram import mel_filters, spectrogram

read_environment()

__all__ = [
    "BackendError",
    "attention",
    "contrastive_loss",
    "decode",
    "distributed_contrastive_loss",
    "grid_codes",
    "grid_offsets",
    "mel_filters",
    "spectrogram",
    "use_backend",
]
