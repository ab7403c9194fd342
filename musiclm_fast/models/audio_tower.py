"""The audio tower: Audio Spectrogram Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast._checks import (
    check_dtype,
    check_finite,
    check_floating,
    check_ndim,
    check_positive_int,
    check_probability,
    check_shape,
    describe,
    fail,
)
from musiclm_fast._wording import plural
from musiclm_fast.audio.batching import as_batch, similar_lengths
from musiclm_fast.models.arguments import record_arguments
from musiclm_fast.models.front_end import (
    FrontEnd,
    PhaseAdvance,
    Spectrogram,
    draw_masks,
    draw_stretch,
    resolve_front_end,
)
from musiclm_fast.nn.transformer import LayerNorm, OffsetBias, Transformer
from musiclm_fast.ops import grid_codes, grid_offsets
from musiclm_fast.ops.spectrogram.reference import span_mask

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
            force_no_patch_dropout: keep all patches in training too.
            return_all_layers: also return the outputs of all blocks but the last.
            lengths: ``(B,)`` integer samples (frames of a spectrogram) of each clip; None where
                all fill the batch.
            input_sample_hz: rate of the waveforms in Hz, if it is not the front end's.

        Returns:
            ``(B, dim)``; with ``return_all_layers`` also ``(depth - 1, B, patches, dim)``, whose
            patches are in row-major order of the grid (the dropped ones left out). Where lengths
            differ, a clip's own patches come first and zeros follow, and a third result
            ``(B,)`` int32 says how many they are.

        Raises:
            ValueError, TypeError: wrong shape or dtype, an empty batch, NaN or infinite samples
                (checked on CPU tensors), a clip shorter than one patch, a rate to change where
                the front end has none.
            ImportError: soxr, which changes the rate, is not installed.
        """
        if isinstance(x, Tensor):
            self._check_input(x)
        if not self.accept_spec:
            to_hz = self.front_end.sample_hz
            x, lengths = as_batch(x, lengths, from_hz=input_sample_hz, to_hz=to_hz)
        elif input_sample_hz is not None:
            fail("input_sample_hz", input_sample_hz, "None: the input is a spectrogram")
        elif not isinstance(x, Tensor):
            fail("x", "a list", "a spectrogram batch: lists are for waveforms")
        self._check_input(x)
        own_frames = self._own_frames(x, lengths)
        stretch, masks = self._draw_augmentation(x, own_frames)
        drops = self.training and not force_no_patch_dropout

        def run(rows: Tensor | None, size: int) -> Embedded:
            def part(t: Tensor | None) -> Tensor | None:
                return t if rows is None or t is None or t.shape[0] == 1 else t[rows.to(t.device)]

            spec = self._spectrogram(
                self._cut(cast(Tensor, part(x)), size), (part(masks[0]), part(masks[1])),
                part(lengths), part(own_frames), part(stretch),
            )  # fmt: skip
            return self._embed(spec, part(own_frames), drops, return_all_layers)

        longest = self._samples(x)
        groups = self._groups(lengths, own_frames)
        if len(groups) <= 1:
            result = run(None, longest)
        else:
            assert lengths is not None
            sizes = lengths.tolist()
            parts = [run(torch.tensor(g), max(sizes[clip] for clip in g)) for g in groups]
            result = _reunited(parts, groups)
        if not return_all_layers:
            return result.out
        assert result.layers is not None
        if result.tokens is None:
            return result.out, result.layers
        return result.out, result.layers, result.tokens

    def _check_input(self, x: Tensor) -> None:
        if self.accept_spec:
            order = "time, frequency" if self.accept_spec_time_first else "frequency, time"
            check_ndim("x", x, 3, f"(B, {order})")
        else:
            check_ndim("x", x, 2, "(B, samples): mono; mix stereo down first")
        check_floating("x", x)
        if x.shape[0] == 0:
            fail("x", "an empty batch", "at least one clip")

    @property
    def shortest_clip(self) -> int:
        """Samples of the shortest waveform that makes a patch."""
        return self.spec.samples(self.patch_size[1])

    def _time_axis(self) -> int:
        return 1 if not self.accept_spec or self.accept_spec_time_first else 2

    def _samples(self, x: Tensor) -> int:
        return x.shape[self._time_axis()]

    def _cut(self, x: Tensor, size: int) -> Tensor:
        return x.narrow(self._time_axis(), 0, size)

    def _frames(self, samples: int) -> int:
        return samples if self.accept_spec else self.spec.frames(samples)

    def _own_frames(self, x: Tensor, lengths: Tensor | None) -> Tensor | None:
        # frames of each clip, (B,) int64 where the lengths lie; None where all fill the batch
        samples = self._samples(x)
        frames = self._frames(samples)
        bands = self.front_end.bands if not self.accept_spec else x.shape[3 - self._time_axis()]
        tall, wide = self.patch_size
        needed = f"at least one patch of {plural(tall, 'band')} and {plural(wide, 'frame')}"
        if not self.accept_spec:
            needed += f" ({plural(self.shortest_clip, 'sample')})"
        if bands < tall or frames < wide:
            found = f"{describe(x)}, {plural(bands, 'band')} and {plural(frames, 'frame')}"
            fail("x", found, needed)
        if lengths is None:
            check_finite("x", x)
            return None
        check_shape("lengths", lengths, (x.shape[0],), "(B,)")
        check_dtype("lengths", lengths, (torch.int64, torch.int32))
        own = lengths.long() if self.accept_spec else self.spec.own_frames(lengths.long())
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            for clip, (length, own_frames) in enumerate(
                zip(lengths.tolist(), own.tolist(), strict=True)
            ):
                if length > samples:
                    fail("lengths", f"{length} of clip {clip}", f"at most the {samples} of x")
                if own_frames < wide:
                    fail(
                        "lengths", f"{length} of clip {clip}, {plural(own_frames, 'frame')}", needed
                    )
        if lengths.device.type == "cpu":
            check_finite("x", x, lengths, self._time_axis())
        return own

    def _draw_augmentation(
        self, x: Tensor, own_frames: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
        # speeds (B,), and spans of masked bands and frames
        if not self.training:
            return None, (None, None)
        frames = self._frames(self._samples(x))
        bands = self.front_end.bands if not self.accept_spec else x.shape[3 - self._time_axis()]
        own = None if own_frames is None else own_frames.to(x.device)
        masks = draw_masks(self.front_end, bands, frames, x.shape[0], x.device, own)
        stretch = None
        if not self.accept_spec:
            stretch = draw_stretch(self.front_end, x.shape[0], x.device)
        return stretch, masks

    def _groups(self, lengths: Tensor | None, own_frames: Tensor | None) -> list[list[int]]:
        # clips that run together; none where they all do
        if lengths is None or own_frames is None or lengths.device.type != "cpu":
            return []
        if torch.compiler.is_compiling():
            return []
        columns = (own_frames // self.patch_size[1]).tolist()
        return similar_lengths(columns, _SPREAD)

    def _spectrogram(
        self,
        x: Tensor,
        masks: tuple[Tensor | None, Tensor | None] = (None, None),
        lengths: Tensor | None = None,
        own_frames: Tensor | None = None,
        stretch: Tensor | None = None,
    ) -> Tensor:
        # (B, samples) or a spectrogram -> (B, F, T), masked, cropped to whole patches
        weight_dtype = cast(Tensor, self.dynamic_pos_bias_mlp[0].weight).dtype
        if x.dtype != torch.float64 or weight_dtype != torch.float64:
            x = x.float()
        crop = self.patch_size
        if not self.accept_spec:
            own = None if lengths is None else lengths.to(x.device)
            spec = self.spec(x, masks, crop, own, stretch, check_finite=False)
            return spec.to(weight_dtype)
        spec = x.transpose(1, 2) if self.accept_spec_time_first else x
        bands, frames = spec.shape[1:]
        if masks[0] is not None:
            spec = spec.masked_fill(span_mask(masks[0], bands).any(1)[:, :, None], 0.0)
        if masks[1] is not None:
            spec = spec.masked_fill(span_mask(masks[1], frames).any(1)[:, None, :], 0.0)
        if own_frames is not None:
            inside = torch.arange(frames, device=x.device) < own_frames.to(x.device)[:, None]
            spec = spec.masked_fill(~inside[:, None, :], 0.0)
        spec = spec[:, : bands // crop[0] * crop[0], : frames // crop[1] * crop[1]]
        return spec.to(weight_dtype)

    def _embed(
        self, spec: Tensor, own_frames: Tensor | None, drops: bool, return_all_layers: bool
    ) -> Embedded:
        # spec (B, F, T), of which own_frames (B,) frames are a clip's own
        batch, bands, frames = spec.shape
        height, width = bands // self.patch_size[0], frames // self.patch_size[1]
        kept, tokens_of = self._draw_kept(batch, height, width, own_frames, spec.device, drops)
        tokens, codes = self._embed_patches(spec, height, width, kept)
        bias = OffsetBias(self._bias_table(height, width), codes, codes)
        tokens, layers = self.transformer(
            tokens, bias=bias, lengths=tokens_of, return_all_layers=return_all_layers
        )
        if tokens_of is None:
            return Embedded(self.norm(tokens.mean(dim=1)), layers, None)
        beyond = torch.arange(tokens.shape[1], device=spec.device) >= tokens_of[:, None]  # (B, n)
        total = tokens.masked_fill(beyond[:, :, None], 0.0).sum(dim=1)
        if layers is not None:
            layers = layers.masked_fill(beyond[None, :, :, None], 0.0)
        return Embedded(self.norm(total / tokens_of[:, None]), layers, tokens_of)

    def _draw_kept(
        self,
        batch: int,
        height: int,
        width: int,
        own_frames: Tensor | None,
        device: torch.device,
        drops: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        # Patches that take part, (B, kept) int64 of the grid's row-major order, and how many of
        # each row they are, (B,) int32; None for all. Each row rises: neighbours in the grid stay
        # neighbours, and neither attention nor the mean sees the order.
        patches = height * width
        share = 1 - self.patch_dropout_prob if drops else 1.0
        keep = max(1, int(patches * share))
        scores = None
        if share < 1.0:
            scores = torch.randn(batch, patches, device=device)
        if own_frames is None:
            if scores is None:
                return None, None
            return scores.topk(keep, dim=-1).indices.sort(dim=-1).values, None
        columns = (own_frames.to(device) // self.patch_size[1]).clamp(1, width)  # (B,)
        place = torch.arange(patches, device=device)
        own = place % width < columns[:, None]  # (B, patches)
        count = (columns * height * share).long().clamp(min=1)
        if scores is not None:
            drawn = scores.masked_fill(~own, -torch.inf).topk(keep, dim=-1).indices
            ranked = torch.arange(keep, device=device) < count[:, None]
            chosen = torch.where(ranked, drawn, patches)
        else:
            chosen = torch.where(own, place, patches)
        # what is not a clip's own goes to the end and shows the last patch, which is never read
        return chosen.sort(dim=-1).values.clamp(max=patches - 1), count.int()

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
            # Select before embedding: dropped patches cost nothing.
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


def _reunited(parts: list[Embedded], groups: list[list[int]]) -> Embedded:
    # groups of clips back in the batch's order, layers padded with zeros
    order = torch.tensor([clip for group in groups for clip in group])
    back = order.argsort().to(parts[0].out.device)
    out = torch.cat([part.out for part in parts])[back]
    tokens = torch.cat([cast(Tensor, part.tokens) for part in parts])[back]
    if parts[0].layers is None:
        return Embedded(out, None, tokens)
    every = [cast(Tensor, part.layers) for part in parts]
    longest = max(layers.shape[2] for layers in every)
    every = [F.pad(layers, (0, 0, 0, longest - layers.shape[2])) for layers in every]
    return Embedded(out, torch.cat(every, dim=1)[:, back], tokens)
