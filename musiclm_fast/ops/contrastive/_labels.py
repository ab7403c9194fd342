"""Labels: which texts are a clip's positives, where they are more than its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_dtype,
    check_same_device,
    check_shape,
    describe,
    fail,
)
from musiclm_fast._wording import plural

Labels = tuple[Tensor, Tensor]  # of audio and of text, (B,) int64 each
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Positives:
    """Labels as the kernels compare them, a row's weight, and whether a loss sums positives."""

    audio: Tensor  # (B,) int32, from 0; equal where labels are
    text: Tensor  # (B,) likewise
    # (B,): the mean of a row's positives averaged with a column's weighs each positive pair by
    # (1 / |P_i| + 1 / |P_j|) / 2. Both counts follow from the label alone, which the pair shares.
    weight: Tensor
    inclusive: bool

    def block(
        self, rows: slice = slice(None), columns: slice = slice(None)
    ) -> tuple[Tensor, Tensor, bool]:
        """The last arguments of a block's kernel."""
        return self.audio[rows], self.text[columns], self.inclusive


def positives(labels: Labels, kind: str, dtype: torch.dtype) -> Positives:
    """Numbers labels by their place in the sorted list of all: any device, no synchronisation."""
    audio, text = labels
    ordered = torch.cat(labels).sort().values
    per_row, per_column = (
        0.5 / count(audio, side).clamp(min=1).to(dtype) for side in (text, audio)
    )
    return Positives(
        torch.searchsorted(ordered, audio, out_int32=True),
        torch.searchsorted(ordered, text, out_int32=True),
        per_row + per_column,
        kind == "softmax",
    )


def check_labels(labels: Any, batch: int, audio: Tensor | None = None) -> Labels | None:
    """Labels of both sides, from one tensor for both or a tuple.

    Args:
        labels: ``(B,)`` integers, a tuple of two, or None.
        batch: B.
        audio: what they must share the device of; None before there are latents.

    Raises:
        ValueError, TypeError: another shape, dtype or device; a tuple of another length.
    """
    if labels is None:
        return None
    allowed = "an integer tensor (B,), or a tuple of two: audio's and text's"
    if isinstance(labels, Tensor):
        named = {"labels": labels}
    elif not isinstance(labels, tuple):
        fail("labels", describe(labels), allowed, TypeError)
    elif len(labels) != 2:
        fail("labels", f"a tuple of {len(labels)}", allowed)
    else:
        named = {f"labels[{side}]": given for side, given in enumerate(labels)}
    for name, given in named.items():
        check_shape(name, given, (batch,), "(B,)")
        check_dtype(name, given, _INTEGERS)
        if audio is not None:
            check_same_device("audio", audio, **{name: given})
    sides = [given.long().contiguous() for given in named.values()]
    return sides[0], sides[-1]


def check_positives(labels: Labels, kind: str) -> None:
    """Read the labels of all pairs: every row and column has a positive, for decoupled a negative.

    Raises:
        ValueError: naming the side and the first labels for which this is not so.
    """
    audio, text = labels
    for side, other, mine, others in (
        ("audio", "text", audio, text),
        ("text", "audio", text, audio),
    ):
        counts = count(mine, others)
        alone = mine[counts == 0].unique().tolist()
        if alone:
            shown = ", ".join(map(str, alone[:5])) + (", ..." if len(alone) > 5 else "")
            found = f"{plural(len(alone), f'{side} label')} without {other} ({shown})"
            fail("labels", found, "every label on both sides")
        if kind == "decoupled" and len(mine) and (most := counts.max()) == len(others):
            found = f"{side} label {int(mine[counts == most][0])} for every {other}"
            fail("labels", found, "several labels: the decoupled loss has no negatives")


def count(mine: Tensor, others: Tensor) -> Tensor:
    """How many of the others equal each of mine."""
    ordered = others.sort().values
    return torch.searchsorted(ordered, mine, right=True) - torch.searchsorted(ordered, mine)
