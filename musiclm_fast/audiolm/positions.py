"""Positions of a stage's tokens as offset codes, and the tables of their biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musiclm_fast.nn.transformer import OffsetBias

# Code of tokens outside the order of positions. Other codes lie in [0, FAR), so a difference with
# FAR exceeds every table's radius and selects an edge entry.
FAR = 2**28


@dataclass(frozen=True)
class Positions:
    """The position bias of a whole sequence. Each forward pass takes a part of it.

    Args:
        table: ``(heads, 2R + 1)``.
        q_codes: ``(n,)`` int32 of the tokens as queries.
        k_codes: ``(front + n,)`` int32 of the null keys, the prefix and the tokens as keys.
    """

    table: Tensor
    q_codes: Tensor
    k_codes: Tensor

    def part(self, start: int, end: int) -> OffsetBias:
        """The bias of the queries from ``start`` to ``end`` and the keys before ``end``."""
        front = self.k_codes.shape[0] - self.q_codes.shape[0]
        return OffsetBias(self.table, self.q_codes[start:end], self.k_codes[: front + end])


def causal_table(left: Tensor, offsets: Tensor, right: Tensor) -> Tensor:
    """A table ``(heads, 2R + 1)`` from its edges ``(heads, 1)`` and the entries for 0 to R - 1.

    Negative offsets are zero; a causal transformer never reads them.
    """
    heads, length = offsets.shape
    return torch.cat((left, offsets.new_zeros(heads, length - 1), offsets, right), dim=1)


def interleaved_offsets(quantizers: int, length: int, device: torch.device) -> Tensor:
    """``0, 1, ..., quantizers - 1, 0, 1, ...``, ``(length,)`` int64."""
    return torch.arange(length, device=device) % quantizers
