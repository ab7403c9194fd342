"""Contrastive losses of a batch that is spread over the ranks of a process group.

Rank r holds its own rows of audio and works on the block (its rows) x (all columns of text), one
kernel call per block; nobody holds more. Two strategies move the text and its gradient:

``all_gather``
    Every rank gathers all text, reduces the columns' statistics over the ranks and reduce-scatters
    the text's gradient. Few, large messages; memory linear in the global batch.
``ring``
    Blocks of text go round from rank to rank, with their columns' statistics in the forward and
    their gradients in the backward. The next block arrives while this one is computed, so a rank
    holds its own and at most two neighbours' blocks: one in use, one in flight.

Source of the ring: https://arxiv.org/abs/2303.15343 (section 3.3), https://arxiv.org/abs/2410.17243.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch.compiler.disable imports the compiler (seconds) when it decorates, this when it is called.
from torch._compile import _disable_dynamo

from musiclm_fast._checks import check_choice, fail
from musiclm_fast._wording import plural
from musiclm_fast.ops.contrastive import _autograd
from musiclm_fast.ops.contrastive.op import (
    KINDS,
    block_kernels,
    check_finite,
    check_latents,
    check_parameters,
    contrastive_loss,
    dispatcher,
    prepare,
)

STRATEGIES = ("all_gather", "ring", "local")


def distributed_contrastive_loss(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    strategy: str = "all_gather",
    group: dist.ProcessGroup | None = None,
    batch_sizes: Sequence[int] | None = None,
    check_values: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of the global batch, whose pairs are spread over ranks; batches may differ.

    Where no process group of more than one rank exists this is
    :func:`musiclm_fast.ops.contrastive_loss`. Whether one exists is looked up in every call.
    Under ``torch.compile`` the communication runs outside the graph.

    Every rank gets the global loss. Gradients are scaled for data parallelism, which averages
    over ranks (DDP, FSDP, accelerate): the mean over ranks of an encoder's gradients is the
    gradient that one process would compute from the whole batch. So ``group`` must be the group
    over which gradients are averaged, and all ranks must scale their losses alike.

    Args:
        audio: ``(L, B, d)`` or ``(B, d)``, this rank's; B may differ by rank, and be 0.
        text: same shape.
        temperature: ``(L,)``, the same on all ranks.
        bias: ``(L,)`` or None, the same on all ranks.
        kind: ``"softmax"``, ``"decoupled"`` or ``"sigmoid"``.
        strategy: ``"all_gather"`` (fewer messages), ``"ring"`` (least memory) or ``"local"`` (this
            rank's pairs alone, with no communication: validation on one rank).
        group: the ranks; None is the default group.
        batch_sizes: B of every rank, if you know them: saves the exchange of sizes and, on GPUs,
            its synchronisation with the host.
        check_values: see :func:`musiclm_fast.ops.contrastive_loss`.
        backend: likewise.

    Returns:
        The global loss, a scalar in float32 (float64 for float64 latents).

    Raises:
        ValueError, TypeError: bad arguments; shapes, dtypes or kinds that differ between ranks; a
            decoupled global batch of one.
        RuntimeError: WORLD_SIZE says there are several ranks, but there is no process group; a rank
            has died or left (raised on the others within the group's timeout).
    """
    check_choice("strategy", strategy, STRATEGIES)
    world = 1 if strategy == "local" else world_size(group)
    if world == 1:
        return contrastive_loss(
            audio, text, temperature, bias, kind=kind, check_values=check_values, backend=backend
        )
    return _across_ranks(
        audio, text, temperature, bias, kind, strategy, group, batch_sizes, check_values, backend
    )


@_disable_dynamo
def _across_ranks(
    audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, kind: str,
    strategy: str, group: dist.ProcessGroup | None, batch_sizes: Sequence[int] | None,
    check_values: bool | None, backend: str | None,
) -> Tensor:  # fmt: skip
    world = dist.get_world_size(group)
    audio, text = check_latents(audio, text)
    check_parameters(audio, temperature, bias, kind)
    check_finite(audio, text, temperature, check_values)
    rank = dist.get_rank(group)
    if batch_sizes is None:
        sizes = _exchange_sizes(audio, kind, bias is not None, group)
    else:
        sizes = [int(size) for size in batch_sizes]
        if len(sizes) != world or sizes[rank] != audio.shape[1]:
            fail("batch_sizes", sizes, f"{world} sizes, rank {rank}'s being {audio.shape[1]}")
    if sum(sizes) < (2 if kind == "decoupled" else 1):
        fail(
            "audio",
            f"{plural(sum(sizes), 'pair')} on all ranks",
            "at least one, or two for decoupled",
        )

    chosen = dispatcher.select(
        backend, audio.device, audio=audio, text=text, temperature=temperature, bias=bias, kind=kind
    ).name
    wide = torch.float64 if audio.dtype == torch.float64 else torch.float32
    if chosen != "torch":
        audio, text = prepare(chosen, audio), prepare(chosen, text)
    ranks = _Ranks(group, rank, tuple(sizes))
    loss: Tensor = _GlobalLoss.apply(
        audio, text, temperature.to(wide), None if bias is None else bias.to(wide),
        kind, strategy, ranks, block_kernels(chosen),
    )  # fmt: skip
    return loss


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of the group, 1 without a process group.

    Raises:
        RuntimeError: the environment's WORLD_SIZE says there are several, but no process group
            has been made: every rank would silently train on its own negatives.
    """
    if dist.is_available() and dist.is_initialized():
        size = dist.get_world_size(group)
        if size < 1:
            raise ValueError("group: this rank is not a member of it")
        return size
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched.isdecimal() and int(launched) > 1:
        raise RuntimeError(
            f"contrastive loss: WORLD_SIZE is {launched}, but there is no process group: call "
            "torch.distributed.init_process_group first, or choose strategy='local' for losses of "
            "each rank's own pairs"
        )
    return 1


@dataclass(frozen=True)
class _Ranks:
    group: dist.ProcessGroup | None
    rank: int
    sizes: tuple[int, ...]  # B of every rank

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def even(self) -> bool:
        """Whether all ranks have as many pairs."""
        return len(set(self.sizes)) == 1

    @property
    def start(self) -> int:
        """Global index of this rank's first pair."""
        return sum(self.sizes[: self.rank])

    def owner(self, step: int) -> int:
        """Whose block this rank works on at a step of the ring."""
        return (self.rank - step) % self.world

    def peer(self, distance: int) -> int:
        """Global rank of the neighbour at a distance in the ring."""
        neighbour = (self.rank + distance) % self.world
        return neighbour if self.group is None else dist.get_global_rank(self.group, neighbour)

    @contextlib.contextmanager
    def expect(self, doing: str) -> Iterator[None]:
        """Name the rank and what it was doing where communication fails."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"contrastive loss: rank {self.rank} of {self.world} failed while {doing}: a rank "
                f"has died, has left or did not come within the process group's timeout ({error})"
            ) from error


def _exchange_sizes(
    audio: Tensor, kind: str, has_bias: bool, group: dist.ProcessGroup | None
) -> list[int]:
    layers, batch, depth = audio.shape
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    facts = [batch, layers, depth, dtypes.index(audio.dtype), KINDS.index(kind), int(has_bias)]
    mine = torch.tensor(facts, device=audio.device)
    world = dist.get_world_size(group)
    ranks = _Ranks(group, dist.get_rank(group), (0,) * world)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    with ranks.expect("exchanging batch sizes"):
        dist.all_gather(everyone, mine, group=group)
        table = torch.stack(everyone).tolist()
    for other, row in enumerate(table):
        if row[1:] != facts[1:]:
            names = ("layers", "width", "dtype", "kind", "bias")
            wrong = [n for n, a, b in zip(names, row[1:], facts[1:], strict=True) if a != b]
            fail("audio, text", f"another {' and '.join(wrong)} on rank {other}", "all ranks alike")
    return [row[0] for row in table]


class _GlobalLoss(torch.autograd.Function):
    """The global loss from this rank's latents; see :func:`distributed_contrastive_loss`."""

    @staticmethod
    def forward(
        ctx: Any, audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None,
        kind: str, strategy: str, ranks: _Ranks, kernels: _autograd.Kernels,
    ) -> Tensor:  # fmt: skip
        ctx.kind, ctx.ranks, ctx.dtype = kind, ranks, audio.dtype
        moves = (_Ring if strategy == "ring" else _AllGather)(ranks, kernels)
        ctx.moves = moves
        if kind == "sigmoid":
            needed = any(ctx.needs_input_grad)
            total, *grads = moves.sigmoid(audio, text, temperature, bias, needed)
            ctx.save_for_backward(*grads)
            ctx.has_bias = bias is not None
        else:
            row, column, positive, *kept = moves.statistics(audio, text, temperature)
            total = _autograd.per_pair(row, column, positive, kind).sum()
            ctx.save_for_backward(audio, temperature, row, column, positive, *kept)
            ctx.bias_shape = None if bias is None else bias.shape
        with ranks.expect("adding up the loss"):
            dist.all_reduce(total, group=ranks.group)
        return total / ranks.total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Data parallelism will divide by the number of ranks.
        scale = grad * (ctx.ranks.world / ctx.ranks.total)
        if ctx.kind == "sigmoid":
            d_audio, d_text, d_temperature, d_bias = ctx.saved_tensors
            d_bias = d_bias * scale if ctx.has_bias else None
        else:
            audio, temperature, row, column, positive, *kept = ctx.saved_tensors
            weights = _autograd.per_pair_gradients(row, column, positive, ctx.kind)
            d_audio, d_text, d_temperature = ctx.moves.statistics_backward(
                weights, audio, temperature, row, column, kept
            )
            shape = ctx.bias_shape
            d_bias = None if shape is None else temperature.new_zeros(shape)  # it cancels
        return (
            (d_audio * scale).to(ctx.dtype), (d_text * scale).to(ctx.dtype),
            d_temperature * scale, d_bias, None, None, None, None,
        )  # fmt: skip


class _AllGather:
    """All text on every rank."""

    def __init__(self, ranks: _Ranks, kernels: _autograd.Kernels) -> None:
        self.ranks, self.kernels = ranks, kernels

    def statistics(
        self, audio: Tensor, text: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Row, own column and positive statistics ``(L, B)``, then what the backward needs."""
        ranks = self.ranks
        everyone = self._gather(text, "gathering text")  # (L, N, d)
        row, part, positive = self.kernels.logsumexp(audio, everyone, temperature, ranks.start)
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
        by_columns = self._gather(by_column.unsqueeze(-1), "gathering the columns' weights")
        d_audio, d_everyone, d_temperature = self.kernels.logsumexp_backward(
            by_row, by_columns.squeeze(-1).contiguous(), by_positive, audio, everyone, temperature,
            row, columns, self.ranks.start,
        )  # fmt: skip
        return d_audio, self._scatter(d_everyone), d_temperature

    def sigmoid(
        self, audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, needed: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """This rank's share of the total, and its gradients."""
        everyone = self._gather(text, "gathering text")
        total, d_audio, d_everyone, d_temperature, d_bias = self.kernels.sigmoid(
            audio, everyone, temperature, bias, self.ranks.start, needed
        )
        d_text = self._scatter(d_everyone) if needed else d_everyone
        return total, d_audio, d_text, d_temperature, d_bias

    def _gather(self, block: Tensor, doing: str) -> Tensor:
        """All ranks' blocks ``(L, B, d)`` along the batch: ``(L, N, d)``."""
        ranks = self.ranks
        layers, _, depth = block.shape
        longest = max(ranks.sizes)
        padded = _pad(block, longest)
        out = block.new_empty(ranks.world, layers, longest, depth)
        with ranks.expect(doing):
            _collective("all_gather_single", "all_gather_into_tensor")(
                out.view(-1, depth), padded.view(-1, depth), group=ranks.group
            )
        if layers == 1 and ranks.even:
            return out.view(1, ranks.total, depth)
        return torch.cat([out[q, :, :size] for q, size in enumerate(ranks.sizes)], dim=1)

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
            _collective("reduce_scatter_single", "reduce_scatter_tensor")(
                out.view(-1, depth), parts.view(-1, depth), group=ranks.group
            )
        return out[:, : ranks.sizes[ranks.rank]]


class _Ring:
    """Blocks of text that go round; this rank's next block comes from the rank before it."""

    def __init__(self, ranks: _Ranks, kernels: _autograd.Kernels) -> None:
        self.ranks, self.kernels = ranks, kernels

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
                audio, block, temperature, self._offset(step, block)
            )
            row = block_row if row is None else torch.logaddexp(row, block_row)
            positive = block_positive if positive is None else positive
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
                block_column.contiguous(), self._offset(step, block),
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
                audio, block, temperature, bias, self._offset(step, block), needed
            )
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

    def _pass(self, mine: Tensor, step: int, what: str) -> _Transfer:
        """Start sending what belongs to this step's block on, and receiving the next step's."""
        shape = list(mine.shape)
        shape[1] = self.ranks.sizes[self.ranks.owner(step + 1)]
        return _Transfer(self.ranks, mine.contiguous(), mine.new_empty(shape), what)


class _Transfer:
    """A tensor on its way to the next rank while another comes from the previous one."""

    _TAGS = ("text", "statistics", "facts", "gradient")

    def __init__(self, ranks: _Ranks, leaving: Tensor, arriving: Tensor, what: str) -> None:
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
        """What has arrived, once; what has left is let go, or a rank would hold a block more."""
        with self.ranks.expect(f"passing {self.what} round the ring"):
            for work in self.works:
                work.wait()
        arrived = self.arriving
        assert arrived is not None
        self.leaving = self.arriving = None
        self.works = []
        return arrived


def _collective(name: str, before: str) -> Any:
    """A function of torch.distributed; torch 2.13 renames two, and warns of the names before."""
    return getattr(dist, name, None) or getattr(dist, before)


def _pad(block: Tensor, length: int) -> Tensor:
    """``(L, B, d)`` with zeros up to ``(L, length, d)``, contiguous."""
    missing = length - block.shape[1]
    return torch.nn.functional.pad(block, (0, 0, 0, missing)).contiguous()
