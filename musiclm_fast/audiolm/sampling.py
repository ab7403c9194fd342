"""Sampling of tokens, and helpers for padding, end tokens and random masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from musiclm_fast._checks import fail


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: divisor of the logits; 0 takes the most likely token.
        filter_thres: share of the vocabulary that is excluded, the least likely tokens first.
        cond_scale: strength of classifier-free guidance; 1 disables it.
    """

    temperature: float = 1.0
    filter_thres: float = 0.9
    cond_scale: float = 3.0

    def __post_init__(self) -> None:
        for name in ("temperature", "filter_thres", "cond_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                fail(name, repr(value), "a number", TypeError)
        if not self.temperature >= 0:
            fail("temperature", self.temperature, "at least 0")
        if not 0 <= self.filter_thres <= 1:
            fail("filter_thres", self.filter_thres, "a share in [0, 1]")


def as_sampling(value: Any) -> dict[str, float]:
    """A stage's sampling settings as keyword arguments: a :class:`Sampling`, a dict or None."""
    if value is None:
        return {}
    if isinstance(value, Sampling):
        return dict(vars(value))
    if not isinstance(value, dict):
        fail("sampling", repr(value), "a Sampling, a dict of its fields, or None", TypeError)
    return dict(vars(Sampling(**value)))


def draw(
    logits: Tensor, noise: Tensor | None, temperature: float = 1.0, filter_thres: float = 0.9
) -> Tensor:
    """Draw one token per row from the most likely ones by the Gumbel trick.

    ::

        argmax over the k largest of  logits / temperature - log(-log(noise))

    with k = max(1, (1 - filter_thres) * codes).

    Args:
        logits: ``(B, codes)``.
        noise: ``(B, codes)`` uniform in [0, 1); None with temperature 0.

    Returns:
        ``(B,)`` int64.
    """
    if temperature == 0 or noise is None:
        return logits.argmax(dim=-1)
    kept = max(int((1 - filter_thres) * logits.shape[-1]), 1)
    values, ids = logits.topk(kept, dim=-1)
    noise = noise.gather(-1, ids)
    gumbel = -torch.log(-torch.log(noise + 1e-20) + 1e-20)
    best = (values / temperature + gumbel).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, best).squeeze(-1)


def append_id(ids: Tensor, value: int) -> Tensor:
    """``ids`` ``(B, n)`` with a column of ``value`` appended."""
    return F.pad(ids, (0, 1), value=value)


def unique_consecutive(ids: Tensor, pad_id: int = -1) -> Tensor:
    """Each row of ``ids`` ``(B, n)`` without consecutive repeats, padded at the end."""
    return pad_sequence(
        [torch.unique_consecutive(row) for row in ids], batch_first=True, padding_value=pad_id
    )


def forgetful_mask(shape: tuple[int, int], mask_prob: float, device: torch.device) -> Tensor:
    """Mask that hides random keys, never the first. https://arxiv.org/abs/2210.13432

    Returns:
        ``shape`` bool, False where hidden: ``int(n * mask_prob)`` of each row's n.
    """
    length = shape[-1]
    drawn = torch.randn(shape, device=device)
    drawn[:, 0] = -torch.finfo(drawn.dtype).max
    hidden = drawn.topk(min(int(length * mask_prob), length - 1), dim=-1).indices
    return torch.ones(shape, dtype=torch.bool, device=device).scatter(1, hidden, False)


def align_right(ids: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ``ids`` ``(B, n)``, padded at the end, with their padding moved to the front.

    Returns:
        The moved ids and the number of tokens of each row ``(B,)``.
    """
    lengths = (ids != pad_id).sum(dim=1)
    source = torch.arange(ids.shape[1], device=ids.device) - (ids.shape[1] - lengths[:, None])
    moved = ids.gather(1, source.clamp_min(0)) if ids.shape[1] else ids
    return moved.masked_fill(source < 0, pad_id), lengths
