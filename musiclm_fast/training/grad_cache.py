"""Gradient caching: MuLaN's loss over a batch larger than memory holds, on one device.

The contrastive loss couples all pairs of a batch, but only through their latents. So the towers run
twice, over chunks: once without gradients, for the latents; the loss then gives the latents'
gradients; and once with gradients, each chunk's latents being multiplied with theirs. Memory is a
chunk's, time about 4/3. Source: https://arxiv.org/abs/2101.06983.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from musiclm_fast._checks import check_positive_int, check_tensor, fail
from musiclm_fast.models.draws import AudioDraws
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.towers import DrawingTower
from musiclm_fast.ops.contrastive._labels import check_labels


def cached_step(
    mulan: nn.Module,
    wavs: Tensor | Sequence[Tensor],
    texts: Tensor | None = None,
    raw_texts: list[str] | None = None,
    *,
    chunk_size: int,
    lengths: Tensor | None = None,
    input_sample_hz: int | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Loss of a batch, with its gradients added to the parameters', in the memory of a chunk.

    In place of ``mulan(wavs, texts).backward()``, and equal to it: SpecAugment's masks (one for the
    whole batch by upstream's defaults) and patch dropout are drawn once for the whole batch,
    as the unchunked step draws them, and dropout is replayed, so that both passes see the same
    network. The dropout layers draw by chunk: with them it is a step with other, as good draws.

    The loss runs over the pairs of all ranks, of which each may hold another number. Under
    DistributedDataParallel (and accelerate, which wraps in it) gradients are exchanged once, with
    the last chunk, whatever the number of chunks. Under ``torch.distributed.fsdp.fully_shard``
    every chunk gathers weights and scatters gradients: all ranks need the same number of chunks.

    Args:
        mulan: a :class:`MuLaN`, alone, inside DistributedDataParallel, or after ``fully_shard``.
        wavs: ``(B, samples)`` or a list of B clips, as for MuLaN.
        texts: ``(B, n)`` token ids.
        raw_texts: B strings, in place of token ids.
        chunk_size: pairs that run together.
        lengths: ``(B,)`` integer samples of each clip of a padded batch.
        input_sample_hz: rate of wavs in Hz, if it is not the audio tower's.
        backward: called with the loss in place of ``loss.backward()``: the place to scale it, as
            with ``lambda loss: scaler.scale(loss / accumulation_steps).backward()``.
        autocast: makes the context of the loss, where the model brings its own for the towers, as
            accelerate's wrappers do: ``accelerator.autocast``.
        labels: of the whole batch, as for MuLaN: positives may lie in different chunks.

    Returns:
        The loss, a detached scalar.

    Raises:
        ValueError, TypeError: a chunk size below 1, no clips, another number of chunks on another
            rank where weights are sharded, a ``backward`` that calls none, or as MuLaN raises.
    """
    check_positive_int("chunk_size", chunk_size)
    if not isinstance(wavs, (list, tuple)):
        check_tensor("wavs", wavs)
    batch = len(wavs)
    if batch == 0:
        fail("wavs", "an empty batch", "at least one clip")
    for name, other in (("texts", texts), ("raw_texts", raw_texts), ("lengths", lengths)):
        if other is not None and len(other) != batch:
            fail(name, f"{len(other)} of them", f"as many as there are clips ({batch})")
    check_labels(labels, batch)
    inner = cast(MuLaN, getattr(mulan, "module", mulan))
    starts = range(0, batch, chunk_size)
    _check_chunks_of_ranks(mulan, inner, len(starts))
    draws: AudioDraws | None = None
    if hasattr(inner.audio, "draw"):
        tower = cast(DrawingTower, inner.audio)
        # Lists are padded and rates changed once, for both passes.
        wavs, lengths = tower.as_batch(wavs, lengths, input_sample_hz=input_sample_hz)
        input_sample_hz = None
        draws = tower.draw(wavs, lengths=lengths)

    def run(model: nn.Module, start: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        rows = slice(start, start + chunk_size)
        result: tuple[tuple[Tensor, ...], dict[str, Tensor]] = model(
            wavs[rows],
            None if texts is None else texts[rows],
            None if raw_texts is None else raw_texts[rows],
            lengths=None if lengths is None else lengths[rows],
            input_sample_hz=input_sample_hz,
            return_loss_latents=True,
            audio_draws=None if draws is None else draws.rows(rows),
        )
        return result

    devices = [p.device for p in inner.parameters() if p.device.type == "cuda"][:1]
    # The first pass needs nothing of DistributedDataParallel; what shards weights gathers them.
    first = inner if isinstance(mulan, DistributedDataParallel) else mulan
    states = []
    parts = []
    parameters: dict[str, Tensor] = {}
    with torch.no_grad():
        for start in starts:
            states.append(_random_state(devices))
            part, parameters = run(first, start)
            parts.append(part)
    # The batch is a latent's last dimension but one: (B, d) or (layers, B, d).
    latents = [torch.cat(p, dim=-2).requires_grad_() for p in zip(*parts, strict=True)]
    parameters = {name: p.requires_grad_() for name, p in parameters.items()}
    del part, parts
    # All that the loss depends on is a leaf: no gradient goes past a wrapper here.
    with autocast():
        loss = inner.loss_of_latents(*latents, parameters=parameters, labels=labels)
    (Tensor.backward if backward is None else backward)(loss)
    if latents[0].grad is None:
        fail("backward", "a function that made no gradients", "one that calls loss.backward()")

    with torch.random.fork_rng(devices):
        for start, state in zip(starts, states, strict=True):
            last = start == starts[-1]
            _set_random_state(state, devices)
            with contextlib.nullcontext() if last else _no_exchange(mulan):
                part, own = run(mulan, start)
                grads = [cast(Tensor, x.grad) for x in latents]
                ends = [
                    (value, grad.narrow(-2, start, value.shape[-2]))
                    for value, grad in zip(part, grads, strict=True)
                ]
                if last:  # the losses' parameters get theirs once
                    ends += [(own[n], cast(Tensor, p.grad)) for n, p in parameters.items()]
                # A scalar whose gradients are those: torch.autograd.backward, given gradients,
                # imports sympy (seconds, 40 MB).
                surrogate = torch.zeros((), device=loss.device)
                for value, grad in ends:
                    surrogate = surrogate + (value * grad).sum()
                surrogate.backward()
                del part, own, ends, value, surrogate  # a chunk's graph, before the next one's
    return loss.detach()


def _check_chunks_of_ranks(mulan: nn.Module, inner: MuLaN, chunks: int) -> None:
    """Where weights are sharded each chunk gathers them, so that ranks must go in step.

    Raises:
        ValueError: another rank has another number of chunks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if not any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in mulan.modules()):
        return
    group = inner.contrast.process_group
    device = next(mulan.parameters()).device
    mine = torch.tensor(chunks, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    counts = [int(c) for c in everyone]
    if len(set(counts)) > 1:
        fail("chunk_size", f"{counts} chunks by rank", "as many on all ranks: weights are sharded")


def _random_state(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def _set_random_state(state: list[Tensor], devices: list[torch.device]) -> None:
    torch.set_rng_state(state[0])
    for device, own in zip(devices, state[1:], strict=True):
        torch.cuda.set_rng_state(own, device)


def _no_exchange(mulan: nn.Module) -> contextlib.AbstractContextManager[Any]:
    if isinstance(mulan, DistributedDataParallel):
        return mulan.no_sync()
    return contextlib.nullcontext()
