"""Contrastive losses of a batch that is spread over the ranks of a process group.

Rank r holds its own rows of audio and works on the block (its rows) x (all columns of text). Two
strategies move the text and its gradient:

``all_gather``
    Every rank gathers all text, reduces the columns' statistics over the ranks and reduce-scatters
    the text's gradient. Few, large messages; memory linear in the global batch.
``ring``
    Blocks of text pass from rank to rank, with their columns' statistics in the forward and their
    gradients in the backward. The next block arrives while this one is computed, so a rank holds
    its own block and at most two others: one in use, one in flight.

Source of the ring: https://arxiv.org/abs/2303.15343 (section 3.3), https://arxiv.org/abs/2410.17243.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch.compiler.disable imports the compiler (seconds) when it decorates, this when it is called.
from torch._compile import _disable_dynamo

from musiclm_fast._checks import check_choice, fail
from musiclm_fast._wording import plural
from musiclm_fast.ops.contrastive import _autograd
from musiclm_fast.ops.contrastive._all_gather import AllGather
from musiclm_fast.ops.contrastive._labels import (
    Positives,
    check_labels,
    check_positives,
    positives,
)
from musiclm_fast.ops.contrastive._ranks import Ranks
from musiclm_fast.ops.contrastive._ring import Ring
from musiclm_fast.ops.contrastive.op import (
    KINDS,
    block_kernels,
    check_finite,
    check_latents,
    check_parameters,
    contrastive_loss,
    dispatcher,
    prepare,
    reads_values,
)

STRATEGIES = ("all_gather", "ring", "local")


def distributed_contrastive_loss(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    strategy: str = "all_gather",
    group: dist.ProcessGroup | None = None,
    batch_sizes: Sequence[int] | None = None,
    check_values: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of the global batch, whose pairs are spread over ranks; batches may differ.

    Without a process group of more than one rank this is
    :func:`musiclm_fast.ops.contrastive_loss`; every call looks the group up. Under
    ``torch.compile`` the communication runs outside the graph.

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
        labels: this rank's, as for :func:`musiclm_fast.ops.contrastive_loss`: equal labels are
            positives on any two ranks. On all ranks or on none.
        strategy: ``"all_gather"`` (fewer messages), ``"ring"`` (least memory) or ``"local"`` (this
            rank's pairs alone, with no communication: validation on one rank).
        group: the ranks; None is the default group.
        batch_sizes: B of every rank, if known. It saves the exchange of sizes and, on GPUs, its
            synchronisation with the host; ranks whose arguments differ are then not found out.
        check_values: see :func:`musiclm_fast.ops.contrastive_loss`.
        backend: likewise.

    Returns:
        The global loss, a scalar in float32 (float64 for float64 latents).

    Raises:
        ValueError, TypeError: bad arguments; shapes, dtypes or kinds that differ between ranks,
            labels on some of them alone; a decoupled global batch of one.
        RuntimeError: WORLD_SIZE says there are several ranks, but there is no process group; a rank
            has died or left (raised on the others within the group's timeout).
    """
    check_choice("strategy", strategy, STRATEGIES)
    world = 1 if strategy == "local" else world_size(group)
    if world == 1:
        return contrastive_loss(
            audio, text, temperature, bias, kind=kind, labels=labels, check_values=check_values,
            backend=backend,
        )  # fmt: skip
    return _across_ranks(
        audio, text, temperature, bias, kind, labels, strategy, group, batch_sizes, check_values,
        backend,
    )  # fmt: skip


@_disable_dynamo
def _across_ranks(
    audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, kind: str,
    labels: Tensor | tuple[Tensor, Tensor] | None, strategy: str, group: dist.ProcessGroup | None,
    batch_sizes: Sequence[int] | None, check_values: bool | None, backend: str | None,
) -> Tensor:  # fmt: skip
    world = dist.get_world_size(group)
    audio, text = check_latents(audio, text)
    check_parameters(audio, temperature, bias, kind)
    sides = check_labels(labels, audio.shape[1], audio)
    check_finite(audio, text, temperature, check_values)
    rank = dist.get_rank(group)
    if batch_sizes is None:
        sizes = _exchange_sizes(audio, kind, bias is not None, sides is not None, group)
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
    ranks = Ranks(group, rank, tuple(sizes))
    found = None
    if sides is not None:
        mine = torch.stack(sides, dim=-1).unsqueeze(0)
        of_audio, of_text = ranks.gather(mine, "gathering labels")[0].unbind(-1)  # (N,) each
        sides = of_audio.contiguous(), of_text.contiguous()
        if reads_values(audio, check_values):
            check_positives(sides, kind)
        found = positives(sides, kind, wide)
    loss: Tensor = _GlobalLoss.apply(
        audio, text, temperature.to(wide), None if bias is None else bias.to(wide),
        kind, strategy, ranks, block_kernels(chosen), found,
    )  # fmt: skip
    return loss


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of the group, 1 without a process group.

    Raises:
        RuntimeError: the environment's WORLD_SIZE says there are several, but there is no process
            group: every rank would silently train on its own negatives.
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


def _exchange_sizes(
    audio: Tensor, kind: str, has_bias: bool, has_labels: bool, group: dist.ProcessGroup | None
) -> list[int]:
    layers, batch, depth = audio.shape
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    facts = [batch, layers, depth, dtypes.index(audio.dtype), KINDS.index(kind)]
    facts += [int(has_bias), int(has_labels)]
    mine = torch.tensor(facts, device=audio.device)
    world = dist.get_world_size(group)
    ranks = Ranks(group, dist.get_rank(group), (0,) * world)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    with ranks.expect("exchanging batch sizes"):
        dist.all_gather(everyone, mine, group=group)
        table = torch.stack(everyone).tolist()
    for other, row in enumerate(table):
        if row[1:] != facts[1:]:
            names = ("layers", "width", "dtype", "kind", "bias", "presence of labels")
            wrong = [n for n, a, b in zip(names, row[1:], facts[1:], strict=True) if a != b]
            fail("audio, text", f"another {' and '.join(wrong)} on rank {other}", "all ranks alike")
    return [row[0] for row in table]


class _GlobalLoss(torch.autograd.Function):
    """The global loss from this rank's latents; see :func:`distributed_contrastive_loss`."""

    @staticmethod
    def forward(
        ctx: Any, audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None,
        kind: str, strategy: str, ranks: Ranks, kernels: _autograd.Kernels,
        labels: Positives | None,
    ) -> Tensor:  # fmt: skip
        ctx.kind, ctx.ranks, ctx.dtype = kind, ranks, audio.dtype
        moves = (Ring if strategy == "ring" else AllGather)(ranks, kernels, labels)
        ctx.weight = None if labels is None else labels.weight[ranks.pairs(ranks.rank)]
        ctx.moves = moves
        if kind == "sigmoid":
            needed = any(ctx.needs_input_grad)
            total, *grads = moves.sigmoid(audio, text, temperature, bias, needed)
            ctx.save_for_backward(*grads)
            ctx.has_bias = bias is not None
        else:
            row, column, positive, *kept = moves.statistics(audio, text, temperature)
            total = _autograd.per_pair(row, column, positive, kind, ctx.weight).sum()
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
            weights = _autograd.per_pair_gradients(row, column, positive, ctx.kind, ctx.weight)
            d_audio, d_text, d_temperature = ctx.moves.statistics_backward(
                weights, audio, temperature, row, column, kept
            )
            shape = ctx.bias_shape
            d_bias = None if shape is None else temperature.new_zeros(shape)  # it cancels
        return (
            (d_audio * scale).to(ctx.dtype), (d_text * scale).to(ctx.dtype),
            d_temperature * scale, d_bias, None, None, None, None, None,
        )  # fmt: skip
