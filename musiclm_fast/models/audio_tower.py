"""The audio tower: Audio Spectrogram Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import (
    check_finite,
    check_positive_int,
    check_probability,
    describe,
    fail,
    is_readable,
)
from musiclm_fast._wording import plural
from musiclm_fast.audio.batching import similar_lengths
from musiclm_fast.models.arguments import record_arguments
from musiclm_fast.models.draws import AudioDraws, draw_kept, own_patches, own_patches_kept
from musiclm_fast.models.front_end import (
    FrontEnd,
    GivenSpectrogram,
    PhaseAdvance,
    Spectrogram,
    draw_masks,
    draw_stretch,
    resolve_front_end,
)
from musiclm_fast.nn.transformer import LayerNorm, OffsetBias, Transformer
from musiclm_fast.ops import grid_codes, grid_offsets

_UPSTREAM = FrontEnd()


_SPREAD = 0.85  # clips run together whose lengths differ by less: padding costs 8% on average


def posemb_sincos_2d(
    height: int, width: int, dim: int, device: torch.device, temperature: float = 10_000
) -> Tensor:
    """Fixed 2-D sine and cosine embedding of a grid. https://arxiv.org/abs/2205.01580

    Returns:
        ``(height * width, dim)`` float32; dim is a multiple of 4.
    """
    omega = torch.arange(dim // 4, device=device) / (dim // 4 - 1)
    omega = 1.0 / (temperature**omega)
    y = torch.arange(height, device=device)[:, None] * omega  # (height, dim / 4)
    x = torch.arange(width, device=device)[:, None] * omega  # (width, dim / 4)
    columns = torch.cat((x.sin(), x.cos()), dim=-1)[None].expand(height, -1, -1)
    rows = torch.cat((y.sin(), y.cos()), dim=-1)[:, None].expand(-1, width, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1)


class AudioSpectrogramTransformer(nn.Module):
    """Transformer over the patches of a spectrogram, with a 2-D dynamic position bias.

    The bias of two patches is an MLP of their (row, column) offset, evaluated once per distinct
    offset and forward pass. In training SpecAugment masks the spectrogram and patch dropout keeps
    a random part of each clip's patches.

    Sources: https://arxiv.org/abs/2104.01778 (AST), https://arxiv.org/abs/1904.08779
    (SpecAugment), https://arxiv.org/abs/2110.05069 (patch dropout),
    https://arxiv.org/abs/2108.00154 (dynamic position bias).

    Args:
        dim: width of the transformer, a multiple of 4.
        depth: number of blocks.
        patch_size: (bands, frames) of a patch, or one number for both.
        dim_head, heads, attn_dropout, ff_mult, ff_dropout: of the transformer.
        accept_spec: the input is a spectrogram, not a waveform.
        accept_spec_time_first: that spectrogram is ``(B, time, frequency)``.
        spec_n_fft, spec_power, spec_win_length, spec_hop_length, spec_pad, spec_center,
            spec_pad_mode: of the spectrogram, in samples, as in torchaudio.
        spec_aug_stretch_factor: kept for checkpoints; nothing is stretched, as in upstream.
        spec_aug_freq_mask, spec_aug_time_mask: widest masks, in bands and frames.
        patch_dropout_prob: share of patches dropped in training.
        front_end: a preset (``"upstream"``, ``"mulan"``, ``"ast"``) or a :class:`FrontEnd`, in
            place of the ``spec_`` arguments.

    Raises:
        ValueError: an argument is out of range, or ``spec_`` arguments stand beside ``front_end``.
    """

    arguments: dict[str, Any]

    @record_arguments
    def __init__(
        self,
        dim: int,
        depth: int,
        patch_size: int | tuple[int, int] = 16,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
        accept_spec: bool = False,
        accept_spec_time_first: bool = True,
        spec_n_fft: int = 128,
        spec_power: float = 2,
        spec_win_length: int = 24,
        spec_hop_length: int | None = None,
        spec_pad: int = 0,
        spec_center: bool = True,
        spec_pad_mode: str = "reflect",
        spec_aug_stretch_factor: float = 0.8,
        spec_aug_freq_mask: int = 80,
        spec_aug_time_mask: int = 80,
        patch_dropout_prob: float = 0.25,
        *,
        front_end: str | FrontEnd | None = None,
    ) -> None:
        super().__init__()
        if dim <= 4 or dim % 4:
            fail("dim", dim, "a multiple of 4 above 4 (for the 2-D sine embedding)")
        if depth < 1:
            fail("depth", depth, "at least 1")
        check_probability("patch_dropout_prob", patch_dropout_prob)
        try:
            asked = FrontEnd(
                n_fft=spec_n_fft, win_length=spec_win_length, hop_length=spec_hop_length,
                pad=spec_pad, center=spec_center, pad_mode=spec_pad_mode, power=spec_power,
                freq_mask=spec_aug_freq_mask, time_mask=spec_aug_time_mask,
            )  # fmt: skip
        except (ValueError, TypeError) as error:  # its names with our prefixes
            prefix = "spec_aug_" if "_mask: " in str(error) else "spec_"
            raise type(error)(f"{prefix}{error}") from None
        if front_end is not None and asked != _UPSTREAM:
            fail("front_end", repr(front_end), "None beside spec_ arguments: give one of the two")
        self.front_end = asked if front_end is None else resolve_front_end(front_end)
        self.dim = dim
        self.depth = depth
        self.patch_size = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        for size in self.patch_size:
            check_positive_int("patch_size", size)
        if not accept_spec and self.front_end.bands < self.patch_size[0]:
            fail(
                "patch_size",
                patch_size,
                f"at most the {plural(self.front_end.bands, 'band')} of a clip",
            )
        self.accept_spec = accept_spec
        self.accept_spec_time_first = accept_spec_time_first
        self.patch_dropout_prob = patch_dropout_prob

        patch_dim = self.patch_size[0] * self.patch_size[1]
        # Index 0 is upstream's parameter-free Rearrange; _patches does its work.
        self.to_patch_tokens = nn.Sequential(
            nn.Identity(), nn.LayerNorm(patch_dim), nn.Linear(patch_dim, dim), nn.LayerNorm(dim)
        )
        self.spec = Spectrogram(self.front_end)
        if accept_spec:
            self.spec = GivenSpectrogram(self.front_end, accept_spec_time_first)
        self.aug = nn.ModuleList([PhaseAdvance(spec_aug_stretch_factor)])
        self.transformer = Transformer(
            dim=dim, depth=depth, dim_head=dim_head, heads=heads, attn_dropout=attn_dropout,
            ff_mult=ff_mult, ff_dropout=ff_dropout,
        )  # fmt: skip
        self.norm = LayerNorm(dim)
        hidden = dim // 4
        self.dynamic_pos_bias_mlp = nn.Sequential(
            nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, heads),
        )  # fmt: skip

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        force_no_patch_dropout: bool = False,
        return_all_layers: bool = False,
        *,
        lengths: Tensor | None = None,
        input_sample_hz: int | None = None,
        draws: AudioDraws | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Embed clips.

        A clip's embedding does not depend on the others' lengths: reflection at its ends, cropping
        to patches, masks per sample and patch dropout use its own. Where the lengths are known on
        the CPU, clips of similar lengths run together and next to nothing is spent on padding;
        lengths on a GPU are not read on the host, and the padded batch runs as one.

        Args:
            x: waveforms ``(B, samples)`` or a list of clips ``(samples,)``, or spectrograms
                ``(B, time, frequency)`` where the tower accepts those (``(B, frequency, time)``
                without ``accept_spec_time_first``).
            force_no_patch_dropout: keep all patches in training too; draws go before it.
            return_all_layers: also return the outputs of all blocks but the last.
            lengths: ``(B,)`` integer samples (frames of a spectrogram) of each clip; None where
                all fill the batch.
            input_sample_hz: rate of the waveforms in Hz, if it is not the front end's.
            draws: what :meth:`draw` made for these clips, in place of new draws.

        Returns:
            ``(B, dim)``; with ``return_all_layers`` also ``(depth - 1, B, patches, dim)``, whose
            patches are in row-major order of the grid (the dropped ones left out). Where lengths
            differ, a clip's own patches come first and zeros follow, and a third result
            ``(B,)`` int32 says how many they are.

        Raises:
            ValueError, TypeError: wrong shape or dtype, an empty batch, NaN or infinite samples
                (checked on CPU tensors), a clip shorter than one patch, a rate to change where
                the front end has none, draws of other clips.
            ImportError: soxr, which changes the rate, is not installed.
        """
        x, lengths = self._clips(x, lengths, input_sample_hz)
        groups = self._groups(lengths)
        if draws is None:
            draws = self._draw(x, lengths, groups, force_no_patch_dropout)
        else:
            draws.check(x.shape[0], self._grid(x), x.device)
        if lengths is None or not groups:
            result = self._embed(x, lengths, draws, return_all_layers)
        else:
            parts = [
                self._embed(x[rows], lengths[rows], draws.rows(rows), return_all_layers)
                for rows in groups
            ]
            result = _reunited(parts, groups)
        if not return_all_layers:
            return result.out
        assert result.layers is not None
        if result.tokens is None:
            return result.out, result.layers
        return result.out, result.layers, result.tokens

    def draw(
        self,
        x: Tensor | Sequence[Tensor],
        force_no_patch_dropout: bool = False,
        *,
        lengths: Tensor | None = None,
        input_sample_hz: int | None = None,
    ) -> AudioDraws:
        """Make the draws that forward would make for these clips; none in evaluation mode.

        Arguments and errors are forward's.
        """
        x, lengths = self._clips(x, lengths, input_sample_hz)
        return self._draw(x, lengths, self._groups(lengths), force_no_patch_dropout)

    def as_batch(
        self,
        x: Tensor | Sequence[Tensor],
        lengths: Tensor | None = None,
        *,
        input_sample_hz: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Check clips and make one padded batch of them, at the front end's rate.

        Arguments and errors are forward's.

        Returns:
            ``(B, samples)`` (a spectrogram as it came), and lengths ``(B,)`` int64 or None.
        """
        return self.spec.as_batch(x, lengths, input_sample_hz)

    @property
    def shortest_clip(self) -> int:
        """Samples of the shortest waveform that makes a patch; frames, of a spectrogram."""
        return self.spec.samples(self.patch_size[1])

    def _clips(
        self, x: Tensor | Sequence[Tensor], lengths: Tensor | None, input_sample_hz: int | None
    ) -> tuple[Tensor, Tensor | None]:
        # a checked batch, time last, of clips that make a patch at least
        x, lengths = self.spec.as_batch(x, lengths, input_sample_hz)
        x = self.spec.time_last(x)
        tall, wide = self.patch_size
        least = self.spec.samples(wide)
        needed = f"at least one patch of {plural(tall, 'band')} and {plural(wide, 'frame')}"
        if not self.accept_spec:
            needed += f" ({plural(least, 'sample')})"
        bands, samples = self.spec.bands(x), x.shape[-1]
        if bands < tall or samples < least:
            frames = plural(self.spec.frames(samples), "frame")
            found = f"a spectrogram of {plural(bands, 'band')} and {frames}"
            fail("x", f"{describe(x)}, {found}", needed)
        if lengths is not None and is_readable(lengths):
            for clip, length in enumerate(lengths.tolist()):
                if length < least:
                    frames = plural(self.spec.frames(length), "frame")
                    fail("lengths", f"{length} of clip {clip}, {frames}", needed)
        check_finite("x", x, lengths, time_axis=-1)
        return x, lengths

    def _groups(self, lengths: Tensor | None) -> list[Tensor]:
        # rows of the clips that run together; none where they all do
        if lengths is None or not is_readable(lengths):
            return []
        groups = similar_lengths(self._columns(lengths).tolist(), _SPREAD)
        return [torch.tensor(group) for group in groups] if len(groups) > 1 else []

    def _grid(self, x: Tensor) -> tuple[int, int]:
        # rows and columns of patches of a batch, time last
        bands, frames = self.spec.bands(x), self.spec.frames(x.shape[-1])
        return bands // self.patch_size[0], frames // self.patch_size[1]

    def _columns(self, lengths: Tensor, most: int | None = None) -> Tensor:
        # columns of patches of each clip; the clamp is for lengths on a GPU, which are not checked
        return (self.spec.own_frames(lengths) // self.patch_size[1]).clamp(1, most)

    def _draw(
        self, x: Tensor, lengths: Tensor | None, groups: list[Tensor], keep_all: bool
    ) -> AudioDraws:
        grid, batch, device = self._grid(x), x.shape[0], x.device
        if not self.training:
            return AudioDraws(grid)
        size = self.spec.bands(x), self.spec.frames(x.shape[-1])
        own = None if lengths is None else self.spec.own_frames(lengths).to(device)
        freq, time = draw_masks(self.front_end, *size, batch, device, own)
        stretch = None if self.accept_spec else draw_stretch(self.front_end, batch, device)
        share = 1 - self.patch_dropout_prob
        if keep_all or share == 1.0:
            return AudioDraws(grid, stretch, freq, time)
        columns = None if lengths is None else self._columns(lengths, grid[1])
        kept = draw_kept(batch, grid, share, device, columns, groups)
        return AudioDraws(grid, stretch, freq, time, kept, share)

    def _embed(
        self, x: Tensor, lengths: Tensor | None, draws: AudioDraws, return_all_layers: bool
    ) -> Embedded:
        if lengths is not None and is_readable(lengths):
            x = x[..., : int(lengths.max())]
        height, width = grid = self._grid(x)
        dtype = cast(Tensor, self.dynamic_pos_bias_mlp[0].weight).dtype
        if x.dtype != torch.float64 or dtype != torch.float64:
            x = x.float()
        masks = draws.freq_mask, draws.time_mask
        lengths = None if lengths is None else lengths.to(x.device)
        spec = self.spec(x, masks, self.patch_size, lengths, draws.stretch, check_finite=False)
        kept, own = draws.kept_within(width), None  # patches that take part, and how many
        if lengths is not None:
            columns = self._columns(lengths, width)
            kept = own_patches(columns, grid) if kept is None else kept
            own = own_patches_kept(columns, grid, draws.share).int()
        # Select before embedding: dropped patches cost nothing.
        tokens, codes = self._embed_patches(spec.to(dtype), height, width, kept)
        bias = OffsetBias(self._bias_table(height, width), codes, codes)
        tokens, layers = self.transformer(
            tokens, bias=bias, lengths=own, return_all_layers=return_all_layers
        )
        if own is None:
            return Embedded(self.norm(tokens.mean(dim=1)), layers, None)
        beyond = torch.arange(tokens.shape[1], device=x.device) >= own[:, None]  # (B, n)
        total = tokens.masked_fill(beyond[:, :, None], 0.0).sum(dim=1)
        if layers is not None:
            layers = layers.masked_fill(beyond[None, :, :, None], 0.0)
        return Embedded(self.norm(total / own[:, None]), layers, own)

    def _embed_patches(
        self, spec: Tensor, height: int, width: int, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # spec (B, F, T) -> tokens (B, n, dim) and their position codes (n,) or (B, n)
        tall, wide = self.patch_size
        patches = spec.unflatten(2, (width, wide)).unflatten(1, (height, tall))
        patches = patches.transpose(2, 3).reshape(spec.shape[0], height * width, tall * wide)
        codes = grid_codes(height, width, spec.device)
        position = posemb_sincos_2d(height, width, self.dim, spec.device).to(spec.dtype)
        if kept is not None:
            patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[-1]))
            codes, position = codes[kept], position[kept]
        return self.to_patch_tokens(patches) + position, codes

    def _bias_table(self, height: int, width: int) -> Tensor:
        # (heads, 2R + 1): one row of the MLP per distinct offset, never per pair
        weight = cast(Tensor, self.dynamic_pos_bias_mlp[0].weight)
        offsets = grid_offsets(height, width, weight.device)
        table: Tensor = self.dynamic_pos_bias_mlp(offsets.to(weight.dtype))
        return table.t().contiguous()


@dataclass(frozen=True)
class Embedded:
    """What the tower makes of clips: ``out (B, dim)``, ``layers (depth - 1, B, n, dim)`` if asked
    for, and ``tokens (B,)``, how many of the n are a clip's own, where that differs."""

    out: Tensor
    layers: Tensor | None
    tokens: Tensor | None


def _reunited(parts: list[Embedded], groups: list[Tensor]) -> Embedded:
    # groups of clips back in the batch's order, layers padded with zeros
    back = torch.cat(groups).argsort().to(parts[0].out.device)
    out = torch.cat([part.out for part in parts])[back]
    tokens = torch.cat([cast(Tensor, part.tokens) for part in parts])[back]
    if parts[0].layers is None:
        return Embedded(out, None, tokens)
    every = [cast(Tensor, part.layers) for part in parts]
    longest = max(layers.shape[2] for layers in every)
    every = [F.pad(layers, (0, 0, 0, longest - layers.shape[2])) for layers in every]
    return Embedded(out, torch.cat(every, dim=1)[:, back], tokens)
