"""From waveform to spectrogram: presets, the spectrogram module and SpecAugment's masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musiclm_fast._checks import (
    check_choice,
    check_ndim,
    check_not_negative_int,
    check_positive,
    check_positive_int,
    fail,
)
from musiclm_fast.audio.batching import as_batch, check_padded
from musiclm_fast.ops import mel_filters, spectrogram
from musiclm_fast.ops.spectrogram.op import PAD_MODES, shortest_clip
from musiclm_fast.ops.spectrogram.reference import check_mel_edges, num_frames, span_mask


@dataclass(frozen=True)
class FrontEnd:
    """Configuration of the front end of the audio tower.

    Args:
        sample_hz: sample rate in Hz that the waveforms must have; None if it is not known, as in
            upstream.
        n_fft, win_length, hop_length, pad: in samples; hop_length None is ``win_length // 2``.
        center, pad_mode, power: as in torchaudio's Spectrogram.
        n_mels: number of mel bands; None keeps the bins of the transform.
        f_min, f_max: edges of the mel bands in Hz; f_max None is the Nyquist frequency.
        log_offset: added before the natural logarithm; None for no logarithm.
        mean, std: fixed normalisation after the logarithm.
        freq_mask, time_mask: the widest mask: bands and frames (int), or a fraction of the axis
            (float below 1); 0 for none.
        masks_per_sample: draw masks per clip on the clip's device, else one for the whole batch
            from the CPU generator, as upstream does.
        time_stretch: largest relative change of speed in training: a clip, or with batch-wide masks
            the batch, plays ``1 - time_stretch`` to ``1 + time_stretch`` times as fast. Upstream's
            stretch has no effect.
    """

    sample_hz: int | None = None
    n_fft: int = 128
    win_length: int = 24
    hop_length: int | None = None
    pad: int = 0
    center: bool = True
    pad_mode: str = "reflect"
    power: float = 2.0
    n_mels: int | None = None
    f_min: float = 0.0
    f_max: float | None = None
    log_offset: float | None = None
    mean: float = 0.0
    std: float = 1.0
    freq_mask: int | float = 80
    time_mask: int | float = 80
    masks_per_sample: bool = False
    time_stretch: float = 0.0

    def __post_init__(self) -> None:
        if self.sample_hz is not None:
            check_positive_int("sample_hz", self.sample_hz)
        check_positive_int("n_fft", self.n_fft)
        check_positive_int("win_length", self.win_length)
        if self.win_length > self.n_fft:
            fail("win_length", self.win_length, f"at most n_fft = {self.n_fft}")
        if self.hop_length is not None:
            check_positive_int("hop_length", self.hop_length)
        check_not_negative_int("pad", self.pad)
        check_choice("pad_mode", self.pad_mode, PAD_MODES)
        check_positive("power", self.power)
        check_positive("std", self.std)
        if self.log_offset is not None:
            check_positive("log_offset", self.log_offset)
        if self.n_mels is not None:
            check_positive_int("n_mels", self.n_mels)
            if self.sample_hz is None:
                fail("sample_hz", None, "a rate in Hz, which mel bands need")
            check_mel_edges(self.sample_hz, self.f_min, self.f_max)
        for name in ("freq_mask", "time_mask"):
            value = getattr(self, name)
            if value < 0 or (isinstance(value, float) and value >= 1):
                fail(name, value, "an integer of at least 0 or a fraction below 1")
        if not 0 <= self.time_stretch < 1:
            fail("time_stretch", self.time_stretch, "at least 0 and below 1")

    @property
    def bands(self) -> int:
        """Bands of the spectrogram before it is cropped to patches."""
        return self.n_fft // 2 + 1 if self.n_mels is None else self.n_mels


#: ``upstream``: musiclm-pytorch's defaults. ``mulan``: 64-band log-mel, 25 ms window and 10 ms
#: hop (MuLan, https://arxiv.org/abs/2208.12415). ``ast``: the same with 128 bands (AST,
#: https://arxiv.org/abs/2104.01778). Masks of the last two are SpecAugment's, sized to the
#: spectrogram. Mean and std are those of General MIDI notes and of speech within a unit.
PRESETS: dict[str, FrontEnd] = {
    "upstream": FrontEnd(),
    "mulan": FrontEnd(
        sample_hz=16_000, n_fft=512, win_length=400, hop_length=160, n_mels=64, f_max=8_000.0,
        log_offset=1e-6, mean=-5.0, std=5.0, freq_mask=0.2, time_mask=0.15, masks_per_sample=True,
    ),
    "ast": FrontEnd(
        sample_hz=16_000, n_fft=512, win_length=400, hop_length=160, n_mels=128, f_max=8_000.0,
        log_offset=1e-6, mean=-5.0, std=5.0, freq_mask=0.2, time_mask=0.15, masks_per_sample=True,
    ),
}  # fmt: skip

#: Saved configurations may contain the old name.
RENAMED_PRESETS = {"reference": "upstream"}


def resolve_front_end(front_end: str | FrontEnd) -> FrontEnd:
    """A preset by name, or the configuration itself.

    Raises:
        ValueError: there is no such preset.
    """
    if isinstance(front_end, FrontEnd):
        return front_end
    if front_end in RENAMED_PRESETS:
        fail("front_end", repr(front_end), f"its new name {RENAMED_PRESETS[front_end]!r}")
    check_choice("front_end", front_end, PRESETS)
    return PRESETS[front_end]


class Spectrogram(nn.Module):
    """The spectrogram of a :class:`FrontEnd`. Its window is in the state_dict, as torchaudio's."""

    window: Tensor
    mel: Tensor | None

    def __init__(self, config: FrontEnd) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.win_length))
        mel = None
        if config.n_mels is not None:
            assert config.sample_hz is not None
            mel = mel_filters(
                config.sample_hz, config.n_fft, config.n_mels, config.f_min, config.f_max
            )
        self.register_buffer("mel", mel, persistent=False)

    def as_batch(
        self, x: Tensor | Sequence[Tensor], lengths: Tensor | None, input_sample_hz: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """One padded batch at the front end's rate, see :func:`musiclm_fast.audio.batching`."""
        return as_batch(x, lengths, from_hz=input_sample_hz, to_hz=self.config.sample_hz)

    def time_last(self, x: Tensor) -> Tensor:
        """A batch as forward takes it: time is the last axis."""
        return x

    def bands(self, x: Tensor) -> int:
        """Bands of the spectrogram of ``x``."""
        return self.config.bands

    def frames(self, samples: int) -> int:
        """Frames of a clip of ``samples`` samples."""
        c = self.config
        return max(0, num_frames(samples, c.n_fft, self.hop_length, c.pad, c.center))

    def samples(self, frames: int) -> int:
        """Samples of the shortest clip of ``frames`` frames."""
        c = self.config
        padding = 2 * c.pad + (c.n_fft // 2 * 2 if c.center else 0)
        least = (frames - 1) * self.hop_length + c.n_fft - padding
        return max(least, shortest_clip(c.n_fft, c.pad, c.center, c.pad_mode))

    def own_frames(self, lengths: Tensor) -> Tensor:
        """Frames of each clip of ``lengths`` samples."""
        c = self.config
        padded = lengths + 2 * c.pad + (c.n_fft // 2 * 2 if c.center else 0)
        return ((padded - c.n_fft) // self.hop_length + 1).clamp(min=0)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        c = self.config
        return c.win_length // 2 if c.hop_length is None else c.hop_length

    def forward(
        self,
        wav: Tensor,
        masks: tuple[Tensor | None, Tensor | None] = (None, None),
        crop: tuple[int, int] = (1, 1),
        lengths: Tensor | None = None,
        stretch_rate: Tensor | None = None,
        check_finite: bool | None = None,
    ) -> Tensor:
        """Spectrogram ``(B, F, T)`` of ``wav (B, samples)``, masked and cropped."""
        c = self.config
        return spectrogram(
            wav, n_fft=c.n_fft, win_length=c.win_length, hop_length=c.hop_length,
            window=self.window, pad=c.pad, center=c.center, pad_mode=c.pad_mode, power=c.power,
            mel=self.mel, log_offset=c.log_offset, mean=c.mean, std=c.std, freq_mask=masks[0],
            time_mask=masks[1], crop=crop, lengths=lengths, stretch_rate=stretch_rate,
            check_finite=check_finite,
        )  # fmt: skip


class GivenSpectrogram(Spectrogram):
    """In place of :class:`Spectrogram` where the input is one; a frame is its sample."""

    def __init__(self, config: FrontEnd, time_first: bool) -> None:
        super().__init__(config)
        self.time_first = time_first

    def as_batch(
        self, x: Tensor | Sequence[Tensor], lengths: Tensor | None, input_sample_hz: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """The checked batch as it came; lengths are int64."""
        if input_sample_hz is not None:
            fail("input_sample_hz", input_sample_hz, "None: the input is a spectrogram")
        if not isinstance(x, Tensor):
            fail("x", "a list", "a spectrogram batch: lists are for waveforms")
        order = "time, frequency" if self.time_first else "frequency, time"
        check_ndim("x", x, 3, f"(B, {order})")
        check_padded("x", self.time_last(x), lengths)
        return x, None if lengths is None else lengths.long()

    def time_last(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.time_first else x

    def bands(self, x: Tensor) -> int:
        return x.shape[1]

    def frames(self, samples: int) -> int:
        return samples

    def samples(self, frames: int) -> int:
        return frames

    def own_frames(self, lengths: Tensor) -> Tensor:
        return lengths

    def forward(
        self,
        x: Tensor,
        masks: tuple[Tensor | None, Tensor | None] = (None, None),
        crop: tuple[int, int] = (1, 1),
        lengths: Tensor | None = None,
        stretch_rate: Tensor | None = None,
        check_finite: bool | None = None,
    ) -> Tensor:
        """Mask and crop ``x (B, F, T)``; nothing is stretched."""
        for axis, spans in enumerate(masks, start=1):
            if spans is not None:
                masked = span_mask(spans, x.shape[axis]).any(1)  # (1 or B, F or T)
                x = x.masked_fill(masked.unsqueeze(3 - axis), 0.0)
        if lengths is not None:
            beyond = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
            x = x.masked_fill(beyond[:, None], 0.0)
        bands, frames = (size // by * by for size, by in zip(x.shape[1:], crop, strict=True))
        return x[:, :bands, :frames]


class PhaseAdvance(nn.Module):
    """Holds the buffer of upstream's TimeStretch, so checkpoints load; computes nothing.

    Upstream passes its stretch factor as torchaudio's hop_length and True as the rate; a
    rate of one has no effect.
    """

    def __init__(self, stretch_factor: float) -> None:
        super().__init__()
        phase = torch.linspace(0, math.pi * stretch_factor, 201)[..., None]
        self.register_buffer("phase_advance", phase)


def draw_span(
    widest: int | float, size: int | Tensor, batch: int | None, device: torch.device
) -> Tensor:
    """Draw mask spans along an axis, as SpecAugment does.

    ``width = rand * widest``, ``start = rand * (size - width)``, both rounded towards zero.

    Args:
        widest: in entries, or a fraction of ``size`` (float below 1).
        size: entries of the axis; or ``(batch,)`` of each sample's.
        batch: one span per sample, drawn on ``device``; None is one span for all, drawn by the
            CPU generator in torchaudio's order.
        device: of the result.

    Returns:
        ``(batch or 1, 1, 2)`` int64, start and end (excluded).
    """
    limit = widest * size if isinstance(widest, float) else widest
    rows, draw_on = (1, "cpu") if batch is None else (batch, device)
    width = torch.rand(rows, device=draw_on) * limit
    start = (torch.rand(rows, device=draw_on) * (size - width)).long()
    return torch.stack((start, start + width.long()), dim=-1)[:, None].to(device)


def draw_masks(
    config: FrontEnd,
    bands: int,
    frames: int,
    batch: int,
    device: torch.device,
    own_frames: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Frequency and time spans for a batch, in upstream's order of draws; None for none.

    Masks per sample are sized to and placed within ``own_frames (batch,)``, where given.
    """
    rows = batch if config.masks_per_sample else None
    within = frames if own_frames is None or rows is None else own_frames
    freq = draw_span(config.freq_mask, bands, rows, device) if config.freq_mask > 0 else None
    time = draw_span(config.time_mask, within, rows, device) if config.time_mask > 0 else None
    return freq, time


def draw_stretch(config: FrontEnd, batch: int, device: torch.device) -> Tensor | None:
    """Speeds ``(batch,)`` for a time stretch; None for none."""
    if config.time_stretch == 0.0:
        return None
    rows, draw_on = (batch, device) if config.masks_per_sample else (1, torch.device("cpu"))
    drawn = torch.rand(rows, device=draw_on).to(device).expand(batch)
    return 1.0 + config.time_stretch * (2.0 * drawn - 1.0)
