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

from musiclm_fast._checks import check_positive_int, check_tensor, fail
from musiclm_fast.audio.batching import as_batch
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
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
    inner = cast(MuLaN, getattr(mulan, "module", mulan))
    starts = range(0, batch, chunk_size)
    _check_chunks_of_ranks(mulan, inner, len(starts))
    tower = inner.audio
    draws: contextlib.AbstractContextManager[Callable[[int], None]]
    draws = contextlib.nullcontext(lambda row: None)  # another class of tower draws nothing
    if isinstance(tower, AudioSpectrogramTransformer):
        if not tower.accept_spec:  # lists are padded and rates changed once, for both passes
            to_hz = tower.front_end.sample_hz
            wavs, lengths = as_batch(wavs, lengths, from_hz=input_sample_hz, to_hz=to_hz)
            input_sample_hz = None
        draws = _drawn_once(tower, cast(Tensor, wavs), lengths)

    def run(model: nn.Module, start: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        rows = slice(start, start + chunk_size)
        clips, own = wavs[rows], None if lengths is None else lengths[rows]
        on_cpu = own is not None and own.device.type == "cpu"  # else it would wait for the device
        if on_cpu and isinstance(tower, AudioSpectrogramTransformer):
            clips = tower._cut(cast(Tensor, clips), int(cast(Tensor, own).max()))
        result: tuple[tuple[Tensor, ...], dict[str, Tensor]] = model(
            clips,
            None if texts is None else texts[rows],
            None if raw_texts is None else raw_texts[rows],
            lengths=own,
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
    with draws as at:
        with torch.no_grad():
            for start in starts:
                states.append(_random_state(devices))
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


@contextlib.contextmanager
def _drawn_once(
    audio: AudioSpectrogramTransformer, wavs: Tensor, lengths: Tensor | None
) -> Iterator[Callable[[int], None]]:
    """The audio tower's draws for the whole batch, in the unchunked order; chunks read theirs.

    Yields a function that says at which row of the batch the next chunk begins.
    """
    audio._check_input(wavs)
    own_frames = audio._own_frames(wavs, lengths)
    stretch, masks = audio._draw_augmentation(wavs, own_frames)
    bands = wavs.shape[3 - audio._time_axis()] if audio.accept_spec else audio.front_end.bands
    height = bands // audio.patch_size[0]

    def width_of(samples: int) -> int:
        return audio._frames(samples) // audio.patch_size[1]

    # Clips of similar lengths draw together, on a grid of their longest's width. Patches that take
    # part are kept as places on the whole batch's grid, which is as wide or wider.
    widest = width_of(audio._samples(wavs))
    groups = audio._groups(lengths, own_frames)
    if len(groups) <= 1:
        groups = [list(range(len(wavs)))]
    places: Tensor | None = None  # (B, kept)
    counts: Tensor | None = None  # (B,)
    for number, group in enumerate(groups):
        width, own = widest, own_frames
        if len(groups) > 1:
            assert lengths is not None and own_frames is not None
            width = width_of(max(int(lengths[clip]) for clip in group))
            own = own_frames[torch.tensor(group)]
        kept, count = audio._draw_kept(len(group), height, width, own, wavs.device, audio.training)
        if kept is None:
            break
        if number == 0:  # the longest clips, which keep the most
            places = kept.new_zeros(len(wavs), kept.shape[1])
            counts = None if count is None else count.new_zeros(len(wavs))
        assert places is not None
        places[group, : kept.shape[1]] = kept // width * widest + kept % width
        if counts is not None and count is not None:
            counts[group] = count

    begin = 0
    waiting: list[list[int]] = []  # a chunk's groups, which the tower runs in this order

    def rows(drawn: Tensor | None, count: int) -> Tensor | None:
        if drawn is None or (drawn.shape[0] == 1 and len(wavs) > 1):
            return drawn  # one for the whole batch
        return drawn[begin : begin + count]

    def draw_augmentation(x: Tensor, _own_frames: Tensor | None) -> Any:
        return rows(stretch, len(x)), (rows(masks[0], len(x)), rows(masks[1], len(x)))

    def groups_of(lengths: Tensor | None, own_frames: Tensor | None) -> list[list[int]]:
        found = type(audio)._groups(audio, lengths, own_frames)
        waiting[:] = found if len(found) > 1 else [[]]
        return found

    def draw_kept(batch: int, height: int, width: int, *_: Any) -> tuple[Any, Any]:
        group = waiting.pop(0) or range(batch)
        if places is None:
            return None, None
        clips = torch.tensor([begin + clip for clip in group], device=places.device)
        chosen = places[clips, : height * width]  # (batch, kept)
        chosen = chosen // widest * width + chosen % widest
        if counts is None:
            return chosen, None
        own = counts[clips]
        beyond = torch.arange(chosen.shape[1], device=own.device) >= own[:, None]
        return chosen.masked_fill(beyond, height * width - 1), own

    def at(row: int) -> None:
        nonlocal begin
        begin = row

    # The tower has no argument for draws made elsewhere: its methods are covered for the while.
    covers = dict(_draw_augmentation=draw_augmentation, _groups=groups_of, _draw_kept=draw_kept)
    audio.__dict__.update(covers)
    try:
        yield at
    finally:
        for name in covers:
            del audio.__dict__[name]
