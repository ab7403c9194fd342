"""The audio tower: Audio Spectrogram Transformer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from musiclm_fast._checks import (
    check_finite,
    check_floating,
    check_ndim,
    check_probability,
    describe,
    fail,
)
from musiclm_fast.models.arguments import record_arguments
from musiclm_fast.models.front_end import (
    FrontEnd,
    PhaseAdvance,
    Spectrogram,
    draw_masks,
    resolve_front_end,
)
from musiclm_fast.models.layers import LayerNorm, OffsetBias, Transformer
from musiclm_fast.ops import grid_codes, grid_offsets
from musiclm_fast.ops.spectrogram.reference import span_mask

_REFERENCE = FrontEnd()


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
        spec_aug_stretch_factor: kept for checkpoints; nothing is stretched, as in the reference.
        spec_aug_freq_mask, spec_aug_time_mask: widest masks, in bands and frames.
        patch_dropout_prob: share of patches dropped in training.
        front_end: a preset (``"reference"``, ``"mulan"``, ``"ast"``) or a :class:`FrontEnd`, in
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
        asked = FrontEnd(
            n_fft=spec_n_fft, win_length=spec_win_length, hop_length=spec_hop_length,
            pad=spec_pad, center=spec_center, pad_mode=spec_pad_mode, power=spec_power,
            freq_mask=spec_aug_freq_mask, time_mask=spec_aug_time_mask,
        )  # fmt: skip
        if front_end is not None and asked != _REFERENCE:
            fail("front_end", repr(front_end), "None beside spec_ arguments: give one of the two")
        self.front_end = asked if front_end is None else resolve_front_end(front_end)
        self.dim = dim
        self.depth = depth
        self.patch_size = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        if not accept_spec and self.front_end.bands < self.patch_size[0]:
            fail("patch_size", patch_size, f"at most the {self.front_end.bands} bands of a clip")
        self.accept_spec = accept_spec
        self.accept_spec_time_first = accept_spec_time_first
        self.patch_dropout_prob = patch_dropout_prob

        patch_dim = self.patch_size[0] * self.patch_size[1]
        # Index 0 is the reference's parameter-free Rearrange; _patches does its work.
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
        x: Tensor,
        force_no_patch_dropout: bool = False,
        return_all_layers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embed clips.

        Args:
            x: waveforms ``(B, samples)``, or spectrograms ``(B, time, frequency)`` where the tower
                accepts those (``(B, frequency, time)`` without ``accept_spec_time_first``).
            force_no_patch_dropout: keep all patches in training too.
            return_all_layers: also return the outputs of all blocks but the last.

        Returns:
            ``(B, dim)``; with ``return_all_layers`` also ``(depth - 1, B, patches, dim)``, whose
            patches are in row-major order of the grid (the dropped ones left out).

        Raises:
            ValueError, TypeError: wrong shape or dtype, an empty batch, NaN or infinite samples
                (checked on CPU tensors), a clip shorter than one patch.
        """
        spec = self._spectrogram(x)
        batch, bands, frames = spec.shape
        height, width = bands // self.patch_size[0], frames // self.patch_size[1]
        kept = self._draw_kept(batch, height * width, spec.device, force_no_patch_dropout)
        tokens, codes = self._embed_patches(spec, height, width, kept)
        bias = OffsetBias(self._bias_table(height, width), codes, codes)
        tokens, layers = self.transformer(tokens, bias=bias, return_all_layers=return_all_layers)
        out = self.norm(tokens.mean(dim=1))
        return (out, layers) if return_all_layers else out

    def _spectrogram(self, x: Tensor) -> Tensor:
        # (B, samples) or a spectrogram -> (B, F, T), masked in training, cropped to whole patches
        if self.accept_spec:
            order = "time, frequency" if self.accept_spec_time_first else "frequency, time"
            check_ndim("x", x, 3, f"(B, {order})")
        else:
            check_ndim("x", x, 2, "(B, samples): mono; mix stereo down first")
        check_floating("x", x)
        if x.shape[0] == 0:
            fail("x", "an empty batch", "at least one clip")
        check_finite("x", x)
        weight_dtype = cast(Tensor, self.dynamic_pos_bias_mlp[0].weight).dtype
        if x.dtype != torch.float64 or weight_dtype != torch.float64:
            x = x.float()

        if self.accept_spec:
            spec = x.transpose(1, 2) if self.accept_spec_time_first else x
            bands, frames = spec.shape[1:]
        else:
            bands, frames = self.front_end.bands, self.spec.frames(x.shape[1])
        crop = self.patch_size
        if bands < crop[0] or frames < crop[1]:
            fail(
                "x",
                f"{describe(x)}, a spectrogram of {bands} bands and {frames} frames",
                f"at least one patch of {crop[0]} bands and {crop[1]} frames",
            )
        masks: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.training:
            masks = draw_masks(self.front_end, bands, frames, x.shape[0], x.device)
        if self.accept_spec:
            if masks[0] is not None:
                spec = spec.masked_fill(span_mask(masks[0], bands).any(1)[:, :, None], 0.0)
            if masks[1] is not None:
                spec = spec.masked_fill(span_mask(masks[1], frames).any(1)[:, None, :], 0.0)
            spec = spec[:, : bands // crop[0] * crop[0], : frames // crop[1] * crop[1]]
        else:
            spec = self.spec(x, masks, crop)
        return spec.to(weight_dtype)

    def _draw_kept(
        self, batch: int, patches: int, device: torch.device, force_no_patch_dropout: bool
    ) -> Tensor | None:
        # (B, kept) int64, each row in rising order: neighbours in the grid stay neighbours, and
        # neither attention nor the mean sees the order.
        if not self.training or self.patch_dropout_prob == 0.0 or force_no_patch_dropout:
            return None
        keep = max(1, int(patches * (1 - self.patch_dropout_prob)))
        drawn = torch.randn(batch, patches, device=device).topk(keep, dim=-1).indices
        return drawn.sort(dim=-1).values

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
