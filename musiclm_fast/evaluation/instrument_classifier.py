"""Evaluation of generated sound by log-mel statistics alone, without any trained model."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import check_ndim, check_shape, fail
from musiclm_fast._wording import plural
from musiclm_fast.ops import mel_filters

_BANDS = 64


_FLOOR = 1e-5  # relative to the loudest bin: -50 dB counts as silence


def log_mel(clips: Tensor, sample_hz: int, bands: int = _BANDS, hop: int = 256) -> Tensor:
    """Log-mel power of clips relative to each clip's loudest bin, which removes the level.

    Args:
        clips: ``(B, samples)``.
        sample_hz: their rate in Hz.
        bands: of the mel scale, 0 Hz to half the rate.
        hop: samples between frames; a frame has 512.

    Returns:
        ``(B, frames, bands)`` in dB, from -50 to 0.
    """
    check_ndim("clips", clips, 2, "(B, samples)")
    if clips.shape[1] < 512:
        fail("clips", plural(clips.shape[1], "sample"), "at least 512")
    filters = mel_filters(sample_hz, 512, bands).t().to(clips)  # (bands, bins)
    spectrum = torch.stft(
        clips, 512, hop, window=torch.hann_window(512).to(clips), center=False, return_complex=True
    )
    power = filters @ spectrum.abs().square()  # (B, bands, frames)
    loudest = power.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    return 10 * (power / loudest).clamp_min(_FLOOR).log10().transpose(1, 2)


class InstrumentClassifier:
    """Names the instrument of a clip by its nearest neighbour among clips of known instruments.

    A clip is described by the mean and the standard deviation over its frames of 20 mel-frequency
    cepstral coefficients, each scaled by its deviation over the known clips.

    Args:
        clips: ``(n, samples)`` the known clips.
        labels: ``(n,)`` int64 from 0 to the number of instruments minus one.
        sample_hz: rate of all clips, in Hz.
    """

    def __init__(self, clips: Tensor, labels: Tensor, sample_hz: int) -> None:
        check_ndim("clips", clips, 2, "(n, samples)")
        check_shape("labels", labels, (clips.shape[0],), "(n,)")
        self.sample_hz, self.labels = sample_hz, labels
        self.instruments = int(labels.max()) + 1
        known = self._describe(clips)
        self.centre, self.spread = known.mean(dim=0), known.std(dim=0).clamp_min(1e-3)
        self.known = (known - self.centre) / self.spread

    def _describe(self, clips: Tensor) -> Tensor:
        angles = (torch.arange(_BANDS)[:, None] + 0.5) * torch.arange(20) * (torch.pi / _BANDS)
        cosines = angles.cos().to(clips)
        parts = []
        for some in clips.split(256):
            cepstrum = log_mel(some, self.sample_hz) @ cosines  # (B, frames, 20)
            parts.append(torch.cat((cepstrum.mean(dim=1), cepstrum.std(dim=1)), dim=1))
        return torch.cat(parts)

    def distances(self, clips: Tensor) -> Tensor:
        """Distance of clips ``(B, samples)`` to the nearest of each instrument ``(B, k)``."""
        own = (self._describe(clips) - self.centre) / self.spread
        to_known = torch.cdist(own, self.known)
        nearest = own.new_full((len(clips), self.instruments), torch.inf)
        return nearest.scatter_reduce(1, self.labels.expand_as(to_known), to_known, "amin")

    def ranks(self, clips: Tensor, labels: Tensor) -> Tensor:
        """Rank of the right instrument for each clip ``(B,)``, 1 for the nearest."""
        distances = self.distances(clips)
        right = distances.gather(1, labels[:, None])
        return (distances <= right).sum(dim=1)


def nearest_clip(clips: Tensor, known: Tensor, sample_hz: int, chunk: int = 512) -> Tensor:
    """Distance of each clip to the nearest known clip, frame by frame.

    ::

        min over known of  root mean square over frames and bands of (log_mel - log_mel')

    A copy of a known clip at any level has distance 0 dB.

    Args:
        clips: ``(B, samples)``.
        known: ``(n, samples)`` of the same length.
        sample_hz: rate of all, in Hz.
        chunk: known clips at a time.

    Returns:
        ``(B,)`` in dB.
    """
    check_ndim("known", known, 2, "(n, samples)")
    if clips.shape[1] != known.shape[1]:
        fail(
            "known",
            f"clips of {plural(known.shape[1], 'sample')}",
            f"{clips.shape[1]}, as clips have",
        )
    own = log_mel(clips, sample_hz, 40, 320).flatten(1)
    least = own.new_full((len(own),), torch.inf)
    for some in known.split(chunk):
        other = log_mel(some, sample_hz, 40, 320).flatten(1)
        least = torch.minimum(least, torch.cdist(own, other).amin(dim=1))
    return least / own.shape[1] ** 0.5
