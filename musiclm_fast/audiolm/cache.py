"""Key-value cache of a transformer, allocated once."""

from __future__ import annotations

import torch
from torch import Tensor

from musiclm_fast._checks import fail
from musiclm_fast._wording import plural


class Cache:
    """Keys and values of all layers' self attention, and those of the cross attention.

    Args:
        depth: layers.
        batch: rows.
        capacity: maximum number of tokens, the prefix included.
        dim_head: width of the single key-value head.
        dtype, device: of the keys and values.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        capacity: int,
        dim_head: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys_values = torch.empty(
            depth, 2, batch, capacity, dim_head, dtype=dtype, device=device
        )
        self.context: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.length = 0
        self._added = 0
        self._stacked_context: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Maximum number of tokens."""
        return self.keys_values.shape[3]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys_values.shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values ``(B, m, dim_head)``; return all so far."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            fail("cache", plural(end, "token"), f"at most its capacity of {self.capacity}")
        keys, values = self.keys_values[layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        self._added = k.shape[1]
        return keys[:, :end], values[:, :end]

    def advance(self, added: int | None = None) -> None:
        """Advance the length by the tokens of the last ``append``, or by ``added``."""
        self.length += self._added if added is None else added

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only ``rows`` ``(kept,)`` int64."""
        self.keys_values = self.keys_values[:, :, rows]
        self.context = [
            (k[rows], v[rows], None if mask is None else mask[rows]) for k, v, mask in self.context
        ]
        self._stacked_context = None

    def stacked_context(self) -> tuple[Tensor | None, Tensor | None]:
        """The cross attention's keys and values ``(depth, 2, B, c, dim_head)`` and their mask.

        The mask is the same in all layers.
        """
        if not self.context:
            return None, None
        if self._stacked_context is None:
            self._stacked_context = torch.stack([torch.stack((k, v)) for k, v, _ in self.context])
        return self._stacked_context, self.context[0][2]

    @classmethod
    def from_stacked(cls, stacked: Tensor, capacity: int) -> Cache:
        """A cache from upstream's layout, ``(depth, 2, B, tokens, dim_head)``."""
        depth, _, batch, length, dim_head = stacked.shape
        cache = cls(depth, batch, capacity, dim_head, stacked.dtype, stacked.device)
        cache.keys_values[..., :length, :] = stacked
        cache.length = length
        return cache

    def stacked(self) -> Tensor:
        """Keys and values in upstream's layout, ``(depth, 2, B, tokens, dim_head)``."""
        return self.keys_values[..., : self.length, :]
