"""The audio tower's random draws: SpecAugment's masks, speeds, and the patches that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musiclm_fast._checks import describe, fail
from musiclm_fast._wording import plural


@dataclass(frozen=True)
class AudioDraws:
    """What the audio tower draws for a batch of B clips; None where nothing is drawn.

    Args:
        grid: rows and columns of the patches of the padded batch.
        stretch: ``(B,)`` speeds.
        freq_mask, time_mask: ``(1 or B, spans, 2)`` int64 bands and frames, start and end
            (excluded).
        kept: ``(B, n)`` int64 patches that take part, rising, in row-major order of the grid. A
            clip that is shorter than the batch has its own first; the others are never read.
        share: the part of a clip's patches that is kept.
    """

    grid: tuple[int, int]
    stretch: Tensor | None = None
    freq_mask: Tensor | None = None
    time_mask: Tensor | None = None
    kept: Tensor | None = None
    share: float = 1.0

    def rows(self, rows: slice | Tensor) -> AudioDraws:
        """The draws of some of the clips."""

        def own(drawn: Tensor | None) -> Tensor | None:
            return None if drawn is None else drawn[rows]

        def own_mask(mask: Tensor | None) -> Tensor | None:
            return mask if mask is None or len(mask) == 1 else mask[rows]

        return AudioDraws(
            self.grid, own(self.stretch), own_mask(self.freq_mask), own_mask(self.time_mask),
            own(self.kept), self.share,
        )  # fmt: skip

    def kept_within(self, columns: int) -> Tensor | None:
        """The kept patches ``(B, m)`` of clips that are cut to fewer columns of patches."""
        height, width = self.grid
        if self.kept is None or columns == width:
            return self.kept
        kept = self.kept[:, : patches_kept((height, columns), self.share)]
        # What is beyond a clip's own patches may fall outside.
        return (kept // width * columns + kept % width).clamp(max=height * columns - 1)

    def check(self, batch: int, grid: tuple[int, int], device: torch.device) -> None:
        """Refuse draws that were made for other clips.

        Raises:
            ValueError: another number of clips, another grid or another device.
        """
        given = {name: drawn for name, drawn in vars(self).items() if isinstance(drawn, Tensor)}
        shapes = {"stretch": (batch,), "kept": (batch, patches_kept(grid, self.share))}
        fits = self.grid == grid
        for name, drawn in given.items():
            found = tuple(drawn.shape)
            of_mask = (1 if found[:1] == (1,) else batch, *found[1:2], 2)
            fits = fits and found == shapes.get(name, of_mask) and drawn.device == device
        if not fits:
            got = [f"{name} {describe(drawn)}" for name, drawn in given.items()]
            got.append(f"a grid of {self.grid}")
            fail(
                "draws",
                ", ".join(got),
                f"those of {plural(batch, 'clip')} on {device}, a grid of {grid}",
            )


def patches_kept(grid: tuple[int, int], share: float) -> int:
    """How many patches of a grid are kept."""
    return max(1, int(grid[0] * grid[1] * share))


def own_patches_kept(columns: Tensor, grid: tuple[int, int], share: float) -> Tensor:
    """How many patches are kept of clips that fill some ``columns (B,)`` of a grid: ``(B,)``."""
    return (columns * grid[0] * share).long().clamp(1, patches_kept(grid, share))


def draw_kept(
    batch: int,
    grid: tuple[int, int],
    share: float,
    device: torch.device,
    columns: Tensor | None = None,
    groups: Sequence[Tensor] = (),
) -> Tensor:
    """Draw the patches that patch dropout keeps.

    Each row rises: neighbours in the grid stay neighbours, and neither attention nor the mean sees
    the order.

    Args:
        batch: number of clips.
        grid: rows and columns of patches.
        share: the part that is kept.
        device: where the draws are made.
        columns: ``(batch,)`` columns of each clip, where they differ.
        groups: rows of clips that run together. They draw together too, on a grid that ends with
            their longest.

    Returns:
        ``(batch, n)`` int64, see :class:`AudioDraws`.
    """
    height, width = grid
    if groups:
        assert columns is not None
        kept = torch.zeros(batch, patches_kept(grid, share), dtype=torch.int64, device=device)
        for rows in groups:
            own = columns[rows]
            widest = int(own.max())
            part = draw_kept(len(rows), (height, widest), share, device, own)
            kept[rows, : part.shape[1]] = part // widest * width + part % widest
        return kept
    patches, keep = height * width, patches_kept(grid, share)
    scores = torch.randn(batch, patches, device=device)
    if columns is None:
        return scores.topk(keep, dim=-1).indices.sort(dim=-1).values
    columns = columns.to(device)
    drawn = scores.masked_fill(~_is_own(columns, grid), -torch.inf).topk(keep, dim=-1).indices
    ranked = torch.arange(keep, device=device) < own_patches_kept(columns, grid, share)[:, None]
    return _in_order(torch.where(ranked, drawn, patches), patches)


def own_patches(columns: Tensor, grid: tuple[int, int]) -> Tensor:
    """All patches of clips that fill some ``columns (B,)`` of a grid: ``(B, patches)`` int64.

    In the order of :attr:`AudioDraws.kept`.
    """
    patches = grid[0] * grid[1]
    place = torch.arange(patches, device=columns.device)
    return _in_order(torch.where(_is_own(columns, grid), place, patches), patches)


def _is_own(columns: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.arange(grid[0] * grid[1], device=columns.device) % grid[1] < columns[:, None]


def _in_order(chosen: Tensor, patches: int) -> Tensor:
    # what is not a clip's own goes to the end and shows the last patch, which is never read
    return chosen.sort(dim=-1).values.clamp(max=patches - 1)
