"""Gradient caching: MuLaN's loss over a batch larger than memory holds, on one device.

The contrastive loss couples all pairs of a batch, but only through their latents. So the towers run
twice, over chunks: once without gradients, for the latents; the loss then gives the latents'
gradients; and once with gradients, each chunk's latents being multiplied with theirs. Memory is a
chunk's, time about 4/3. Source: https://arxiv.org/abs/2101.06983.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from musiclm_fast._checks import check_positive_int, fail
from musiclm_fast.models.audio import AudioSpectrogramTransformer
from musiclm_fast.models.mulan import MuLaN


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
) -> Tensor:
    """Loss of a batch, with its gradients added to the parameters', in the memory of a chunk.

    In place of ``mulan(wavs, texts).backward()``, and equal to it: SpecAugment's masks (one for the
    whole batch by the reference's defaults) and patch dropout are drawn once for the whole batch,
    as the unchunked step draws them, and dropout is replayed, so that both passes see the same
    network. Where ``lengths``, ``input_sample_hz`` or a list of clips is given each chunk draws its
    own masks; the dropout layers draw by chunk in any case.

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

    Returns:
        The loss, a detached scalar.

    Raises:
        ValueError, TypeError: a chunk size below 1, no clips, another number of chunks on another
            rank where weights are sharded, a ``backward`` that calls none, or as MuLaN raises.
    """
    check_positive_int("chunk_size", chunk_size)
    batch = len(wavs)
    if batch == 0:
        fail("wavs", "an empty batch", "at least one clip")
    for name, other in (("texts", texts), ("raw_texts", raw_texts), ("lengths", lengths)):
        if other is not None and len(other) != batch:
            fail(name, f"{len(other)} of them", f"as many as there are clips ({batch})")
    inner = cast(MuLaN, getattr(mulan, "module", mulan))
    starts = range(0, batch, chunk_size)
    _check_chunks_of_ranks(mulan, inner, len(starts))

    def run(model: nn.Module, start: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        rows = slice(start, start + chunk_size)
        result: tuple[tuple[Tensor, ...], dict[str, Tensor]] = model(
            wavs[rows],
            None if texts is None else texts[rows],
            None if raw_texts is None else raw_texts[rows],
            lengths=None if lengths is None else lengths[rows],
            input_sample_hz=input_sample_hz,
            return_loss_latents=True,
        )
        return result

    devices = [p.device for p in inner.parameters() if p.device.type == "cuda"][:1]
    # The first pass needs nothing of DistributedDataParallel; what shards weights gathers them.
    first = inner if isinstance(mulan, DistributedDataParallel) else mulan
    states = []
    parts = []
    parameters: dict[str, Tensor] = {}
    whole = lengths is None and isinstance(wavs, Tensor) and input_sample_hz is None
    draws: contextlib.AbstractContextManager[Callable[[int], None] | None] = (
        _drawn_once(inner.audio, cast(Tensor, wavs))
        if whole and isinstance(inner.audio, AudioSpectrogramTransformer)
        else contextlib.nullcontext()
    )
    with draws as at:
        with torch.no_grad():
            for start in starts:
                states.append(_random_state(devices))
                if at is not None:
                    at(start)
                part, parameters = run(first, start)
                parts.append(part)
        # The batch is a latent's last dimension but one: (B, d) or (layers, B, d).
        latents = [torch.cat(p, dim=-2).requires_grad_() for p in zip(*parts, strict=True)]
        parameters = {name: p.requires_grad_() for name, p in parameters.items()}
        del part, parts
        # All that the loss depends on is a leaf: no gradient goes past a wrapper here.
        loss = inner.loss_of_latents(*latents, parameters=parameters)
        (Tensor.backward if backward is None else backward)(loss)
        if latents[0].grad is None:
            fail("backward", "a function that made no gradients", "one that calls loss.backward()")

        with torch.random.fork_rng(devices):
            for start, state in zip(starts, states, strict=True):
                last = start == starts[-1]
                _set_random_state(state, devices)
                if at is not None:
                    at(start)
                with contextlib.nullcontext() if last else _no_exchange(mulan):
                    part, own = run(mulan, start)
                    grads = [cast(Tensor, x.grad) for x in latents]
                    ends = [
                        (value, grad.narrow(-2, start, value.shape[-2]))
                        for value, grad in zip(part, grads, strict=True)
                    ]
                    if last:  # the losses' parameters get theirs once
                        ends += [(own[n], cast(Tensor, p.grad)) for n, p in parameters.items()]
                    ends = [end for end in ends if end[0].requires_grad]
                    torch.autograd.backward([e[0] for e in ends], [e[1] for e in ends])
                    del part, own, ends  # a chunk's graph, before the next one's
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


@contextlib.contextmanager
def _drawn_once(
    audio: AudioSpectrogramTransformer, wavs: Tensor
) -> Iterator[Callable[[int], None]]:
    """The audio tower's draws for the whole batch, in the unchunked order; chunks read theirs.

    Yields a function that says at which row of the batch the next chunk begins.
    """
    stretch, masks = audio._draw_augmentation(wavs, None)
    height = audio.front_end.bands // audio.patch_size[0]
    width = audio._frames(audio._samples(wavs)) // audio.patch_size[1]
    if audio.accept_spec:
        height = wavs.shape[3 - audio._time_axis()] // audio.patch_size[0]
    kept, _ = audio._draw_kept(len(wavs), height, width, None, wavs.device, audio.training)
    begin = 0

    def rows(drawn: Tensor | None, count: int) -> Tensor | None:
        if drawn is None or (drawn.shape[0] == 1 and len(wavs) > 1):
            return drawn  # one for the whole batch
        return drawn[begin : begin + count]

    def draw_augmentation(x: Tensor, _own_frames: Tensor | None) -> Any:
        return rows(stretch, len(x)), (rows(masks[0], len(x)), rows(masks[1], len(x)))

    def draw_kept(batch: int, *_: Any) -> tuple[Tensor | None, None]:
        return rows(kept, batch), None

    def at(row: int) -> None:
        nonlocal begin
        begin = row

    # The tower has no argument for draws made elsewhere: its methods are covered for the while.
    audio.__dict__["_draw_augmentation"] = draw_augmentation
    audio.__dict__["_draw_kept"] = draw_kept
    try:
        yield at
    finally:
        del audio.__dict__["_draw_augmentation"], audio.__dict__["_draw_kept"]
