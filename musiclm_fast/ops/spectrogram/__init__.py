from musiclm_fast.ops.spectrogram.op import spectrogram
from musiclm_fast.ops.spectrogram.reference import (
    mel_filters,
    num_frames,
    spectrogram_reference,
    stretch_time,
)

__all__ = ["mel_filters", "num_frames", "spectrogram", "spectrogram_reference", "stretch_time"]
