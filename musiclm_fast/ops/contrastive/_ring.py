"""The strategy that passes blocks of text from rank to rank: least memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from musiclm_fast.ops.contrastive._autograd import Kernels
from musiclm_fast.ops.contrastive._labels import Positives
from musiclm_fast.ops.contrastive._ranks import Ranks


class Ring:
    """Blocks of text circulate: this rank's next block comes from the previous rank."""

    def __init__(self, ranks: Ranks, kernels: Kernels, labels: Positives | None) -> None:
        self.ranks, self.kernels, self.labels = ranks, kernels, labels

    def statistics(
        self, audio: Tensor, text: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, own column and positive statistics ``(L, B)``, then what the backward needs."""
        ranks = self.ranks
        block = text
        row = column = positive = None
        statistics: _Transfer | None = None
        for step in range(ranks.world):
            arriving = self._pass(block, step, "text") if step + 1 < ranks.world else None
            block_row, block_column, block_positive = self.kernels.logsumexp(
                audio, block, temperature, self._offset(step, block), *self._labels(step)
            )
            row = block_row if row is None else torch.logaddexp(row, block_row)
            positive = block_positive if positive is None else positive + block_positive
            if statistics is not None:  # over the rows of the ranks that had this block before
                block_column = torch.logaddexp(block_column, statistics.wait())
            statistics = self._pass(block_column, step, "statistics")
            if arriving is not None:
                block = arriving.wait()
        assert row is not None and positive is not None and statistics is not None
        column = statistics.wait()  # this rank's own, after the whole round
        return row, column, positive, text

    def statistics_backward(
        self, weights: tuple[Tensor, Tensor, Tensor], audio: Tensor, temperature: Tensor,
        row: Tensor, column: Tensor, kept: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of audio, of this rank's text, and this rank's share of temperature's."""
        ranks = self.ranks
        by_row, by_column, by_positive = weights
        (block,) = kept
        facts = torch.stack((column, by_column), dim=-1)  # (L, B, 2) travel with the block
        d_audio = d_temperature = None
        gradient: _Transfer | None = None
        for step in range(ranks.world):
            arriving = []
            if step + 1 < ranks.world:
                arriving = [self._pass(block, step, "text"), self._pass(facts, step, "facts")]
            block_column, block_weight = facts.unbind(-1)
            block_audio, block_text, block_temperature = self.kernels.logsumexp_backward(
                by_row, block_weight.contiguous(), by_positive, audio, block, temperature, row,
                block_column.contiguous(), self._offset(step, block), *self._labels(step),
            )  # fmt: skip
            d_audio = block_audio if d_audio is None else d_audio.add_(block_audio)
            if d_temperature is None:
                d_temperature = block_temperature
            else:
                d_temperature = d_temperature + block_temperature
            if gradient is not None:
                block_text.add_(gradient.wait())
            gradient = self._pass(block_text, step, "gradient")
            if arriving:
                block, facts = (transfer.wait() for transfer in arriving)
        assert d_audio is not None and d_temperature is not None and gradient is not None
        return d_audio, gradient.wait(), d_temperature

    def sigmoid(
        self, audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, needed: bool
    ) -> tuple[Tensor, ...]:
        """This rank's share of the total, and its gradients."""
        ranks = self.ranks
        block = text
        sums: list[Tensor] | None = None  # total, d_audio, d_temperature, d_bias
        gradient: _Transfer | None = None
        for step in range(ranks.world):
            arriving = self._pass(block, step, "text") if step + 1 < ranks.world else None
            total, d_audio, block_text, d_temperature, d_bias = self.kernels.sigmoid(
                audio, block, temperature, bias, self._offset(step, block), needed,
                *self._labels(step)[:2],
            )  # fmt: skip
            mine = [total, d_audio, d_temperature, d_bias]
            sums = mine if sums is None else [a.add_(b) for a, b in zip(sums, mine, strict=True)]
            if needed:
                if gradient is not None:
                    block_text.add_(gradient.wait())
                gradient = self._pass(block_text, step, "gradient")
            if arriving is not None:
                block = arriving.wait()
        assert sums is not None
        total, d_audio, d_temperature, d_bias = sums
        d_text = text.new_empty(0) if gradient is None else gradient.wait()
        return total, d_audio, d_text, d_temperature, d_bias

    def _offset(self, step: int, block: Tensor) -> int:
        """Row i's positive is column i of this rank's own block, and outside any other."""
        return 0 if step == 0 else block.shape[1]

    def _labels(self, step: int) -> tuple[Any, ...]:
        """The kernels' last arguments for this step's block."""
        if self.labels is None:
            return ()
        ranks = self.ranks
        return self.labels.block(ranks.pairs(ranks.rank), ranks.pairs(ranks.owner(step)))

    def _pass(self, mine: Tensor, step: int, what: str) -> _Transfer:
        """Start sending a tensor of this step's block on, and receiving the next block's."""
        shape = list(mine.shape)
        shape[1] = self.ranks.sizes[self.ranks.owner(step + 1)]
        return _Transfer(self.ranks, mine.contiguous(), mine.new_empty(shape), what)


class _Transfer:
    """Sends a tensor to the next rank and receives one from the previous rank."""

    _TAGS = ("text", "statistics", "facts", "gradient")

    def __init__(self, ranks: Ranks, leaving: Tensor, arriving: Tensor, what: str) -> None:
        self.ranks, self.what = ranks, what
        self.leaving: Tensor | None = leaving  # kept alive until wait()
        self.arriving: Tensor | None = arriving
        tag = self._TAGS.index(what)
        # Empty tensors are not sent: both ends know the sizes.
        moves = [
            dist.P2POp(call, tensor, ranks.peer(distance), ranks.group, tag)
            for call, tensor, distance in (
                (dist.isend, leaving, 1),
                (dist.irecv, arriving, -1),
            )
            if tensor.numel()
        ]
        with ranks.expect(f"passing {what} round the ring"):
            self.works = dist.batch_isend_irecv(moves) if moves else []

    def wait(self) -> Tensor:
        """The received tensor; call it once. Releases both tensors, to hold one block less."""
        with self.ranks.expect(f"passing {self.what} round the ring"):
            for work in self.works:
                work.wait()
        arrived = self.arriving
        assert arrived is not None
        self.leaving = self.arriving = None
        self.works = []
        return arrived
