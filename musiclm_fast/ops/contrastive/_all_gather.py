"""The strategy that gathers all text on every rank: few, large messages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from musiclm_fast.ops.contrastive._autograd import Kernels
from musiclm_fast.ops.contrastive._labels import Positives
from musiclm_fast.ops.contrastive._ranks import Ranks, collective


class AllGather:
    """All text on every rank."""

    def __init__(self, ranks: Ranks, kernels: Kernels, labels: Positives | None) -> None:
        self.ranks, self.kernels = ranks, kernels
        self.labels = () if labels is None else labels.block(rows=ranks.pairs(ranks.rank))

    def statistics(
        self, audio: Tensor, text: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Row, own column and positive statistics ``(L, B)``, then what the backward needs."""
        ranks = self.ranks
        everyone = ranks.gather(text, "gathering text")  # (L, N, d)
        row, part, positive = self.kernels.logsumexp(
            audio, everyone, temperature, ranks.start, *self.labels
        )
        # Columns meet other rows on other ranks: log-sum-exp over ranks, (L, N).
        with ranks.expect("adding up the columns' statistics"):
            shift = part.clone()
            dist.all_reduce(shift, dist.ReduceOp.MAX, group=ranks.group)
            shift = shift.masked_fill(shift == -torch.inf, 0.0)
            total = (part - shift).exp()
            dist.all_reduce(total, group=ranks.group)
        columns = shift + total.log()
        own = columns[:, ranks.start : ranks.start + audio.shape[1]]
        return row, own, positive, columns, everyone

    def statistics_backward(
        self, weights: tuple[Tensor, Tensor, Tensor], audio: Tensor, temperature: Tensor,
        row: Tensor, column: Tensor, kept: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of audio, of this rank's text, and this rank's share of temperature's."""
        columns, everyone = kept
        by_row, by_column, by_positive = weights
        ranks = self.ranks
        by_columns = ranks.gather(by_column.unsqueeze(-1), "gathering the columns' weights")
        d_audio, d_everyone, d_temperature = self.kernels.logsumexp_backward(
            by_row, by_columns.squeeze(-1).contiguous(), by_positive, audio, everyone, temperature,
            row, columns, ranks.start, *self.labels,
        )  # fmt: skip
        return d_audio, self._scatter(d_everyone), d_temperature

    def sigmoid(
        self, audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, needed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """This rank's share of the total, and its gradients."""
        ranks = self.ranks
        everyone = ranks.gather(text, "gathering text")
        total, d_audio, d_everyone, d_temperature, d_bias = self.kernels.sigmoid(
            audio, everyone, temperature, bias, ranks.start, needed, *self.labels[:2]
        )
        d_text = self._scatter(d_everyone) if needed else d_everyone
        return total, d_audio, d_text, d_temperature, d_bias

    def _scatter(self, everyone: Tensor) -> Tensor:
        """This rank's rows ``(L, B, d)`` of the sum over ranks of ``(L, N, d)``."""
        ranks = self.ranks
        layers, _, depth = everyone.shape
        longest = max(ranks.sizes)
        if layers == 1 and ranks.even:
            parts = everyone.contiguous()
        else:
            parts = everyone.new_zeros(ranks.world, layers, longest, depth)
            for part, own in zip(parts, everyone.split(ranks.sizes, dim=1), strict=True):
                part[:, : own.shape[1]] = own
        out = everyone.new_empty(layers, longest, depth)
        with ranks.expect("adding up the text's gradient"):
            collective("reduce_scatter_single", "reduce_scatter_tensor")(
                out.view(-1, depth), parts.view(-1, depth), group=ranks.group
            )
        return out[:, : ranks.sizes[ranks.rank]]
