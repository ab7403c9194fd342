"""Other packages' spectrograms behind one interface: from keyword arguments of the op to a function
of waveforms. Each ends with the same mel filters, logarithm and masks in torch, where it has none.

torchaudio; nnAudio, whose transform is a convolution; flashmel, one CUDA kernel up to the mel
filters, without a gradient. requirements/peers.txt names the packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_spectrogram as common

Transform = Callable[[Tensor], Tensor]
SAMPLE_HZ = 16_000


def with_mel(power: Tensor, given: dict[str, Any]) -> Tensor:
    """Mel filters, if a call has them, logarithm and masks."""
    if "mel" in given:
        power = (power.transpose(1, 2) @ given["mel"]).transpose(1, 2)
    return finished(power, given)


def finished(out: Tensor, given: dict[str, Any]) -> Tensor:
    """Logarithm, if a call has one, and masks."""
    if "mel" in given:
        out = out.add(given["log_offset"]).log()
    for axis, name in ((1, "freq_mask"), (2, "time_mask")):
        place = torch.arange(out.shape[axis], device=out.device)
        inside = (place >= given[name][0, 0, 0]) & (place < given[name][0, 0, 1])
        out = out.masked_fill(inside[:, None] if axis == 1 else inside, 0.0)
    return out


def torchaudio(given: dict[str, Any]) -> Transform:
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):  # its binary may need another torch
        common.load_torchaudio()
    from torchaudio.functional import spectrogram

    sizes = (given[name] for name in ("n_fft", "hop_length", "win_length"))
    arguments = (0, given["window"], *sizes, 2.0, False)
    return lambda wav: with_mel(spectrogram(wav, *arguments), given)


def nnaudio(given: dict[str, Any]) -> Transform:
    from nnAudio.features import STFT

    sizes = {name: given[name] for name in ("n_fft", "hop_length", "win_length")}
    stft = STFT(**sizes, window="hann", output_format="Complex", verbose=False)
    stft = stft.to(given["window"].device)
    return lambda wav: with_mel(stft(wav).square().sum(-1), given)


def flashmel(given: dict[str, Any]) -> Transform:
    from flashmel import MelSpectrogram

    if "mel" not in given:
        raise RuntimeError("it computes mel bands alone")
    sizes = {name: given[name] for name in ("n_fft", "hop_length", "win_length")}
    mel = MelSpectrogram(SAMPLE_HZ, **sizes, n_mels=given["mel"].shape[1])
    mel = mel.to(given["window"].device)
    return lambda wav: finished(mel(wav), given)


PEERS = {"torchaudio": torchaudio, "nnAudio": nnaudio, "flashmel": flashmel}


def check(name: str, given: dict[str, Any], wanted: Transform) -> None:
    """Raise unless a peer computes a second of noise as the reference does, to 0.1%.

    Raises:
        AssertionError: naming the peer.
    """
    wav = torch.randn(2, SAMPLE_HZ, generator=torch.Generator().manual_seed(1))
    wav = wav.to(given["window"].device)
    found, want = PEERS[name](given)(wav), wanted(wav)
    off = ((found - want).norm() / want.norm()).item()
    if not off <= 1e-3:
        raise AssertionError(f"{name} is off by {off:.2%}")
