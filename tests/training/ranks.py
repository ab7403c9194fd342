"""MuLaN's step on two ranks, in every way of sharing it; test_ranks.py launches this.

Run as ``accelerate launch --multi_gpu --num_processes 2 -m tests.training.ranks FOLDER``: without
MPI the launcher starts several processes under that flag alone; Accelerator(cpu=True) makes them
gloo ranks on CPUs.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (7, 4)
LOSSES: dict[str, dict[str, Any]] = {
    "decoupled": {},
    "decoupled, labels": {},
    "sigmoid, hierarchical": dict(
        sigmoid_contrastive_loss=True, hierarchical_contrastive_loss=True
    ),
}
WRAPPERS = ("accelerate", "fully_shard")
STEPS = ("plain", "cached")
CASES = list(itertools.product(LOSSES, WRAPPERS, STEPS))


def make(loss: str) -> nn.Module:
    """A small MuLaN in float64, so that equal means equal."""
    from musiclm_fast import AudioSpectrogramTransformer, MuLaN, TextTransformer

    torch.manual_seed(0)
    size = dict(dim=32, depth=2, heads=2, dim_head=16)
    audio = AudioSpectrogramTransformer(**size, spec_n_fft=64, spec_win_length=24)
    text = TextTransformer(num_tokens=50, **size)
    return MuLaN(audio, text, dim_latent=16, **LOSSES[loss]).double().eval()


def inputs() -> tuple[Tensor, Tensor]:
    """The global batch."""
    generator = torch.Generator().manual_seed(1)
    wavs = torch.randn(sum(SIZES), 1500, generator=generator, dtype=torch.float64)
    return wavs, torch.randint(1, 50, (sum(SIZES), 7), generator=generator)


def labels(loss: str) -> Tensor | None:
    """Of the global batch, for the losses that have them: equal ones on both ranks."""
    return torch.arange(sum(SIZES)) % 5 if loss.endswith("labels") else None


def whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def results(accelerator: Any) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Loss and whole gradients of each case."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from musiclm_fast.training.grad_cache import cached_step

    rank = accelerator.process_index
    start = sum(SIZES[:rank])
    mine = [x[start : start + SIZES[rank]] for x in inputs()]
    mesh = init_device_mesh("cpu", (len(SIZES),))
    for case in CASES:
        loss, wrapper, step = case
        model = make(loss)
        given = labels(loss)
        if given is not None:
            given = given[start : start + SIZES[rank]]
        backward: Callable[[Tensor], Any] = Tensor.backward
        chunk_size = 2  # four chunks here, two there: DistributedDataParallel does not mind
        if wrapper == "accelerate":
            model = accelerator.prepare(model)
            backward = accelerator.backward
        else:
            for tower in (model.audio, model.text, model):
                fully_shard(tower, mesh=mesh, reshard_after_forward=True)
            chunk_size = (2, 1)[rank]
        if step == "plain":
            value = model(*mine, labels=given)
            backward(value)
        else:
            value = cached_step(
                model, *mine, chunk_size=chunk_size, backward=backward, labels=given
            )
        found = {"loss": value.detach()}
        for name, parameter in model.named_parameters():
            found[name.removeprefix("module.")] = whole(parameter.grad)
        yield case, found
        if wrapper == "fully_shard" and step == "cached":
            try:
                cached_step(model, *mine, chunk_size=2)
            except ValueError as error:
                yield (*case, "other chunks"), str(error)  # type: ignore[misc]


def main(folder: str) -> None:
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    with warnings.catch_warnings():
        # Torch's own fully_shard calls what torch has renamed; none of our calls may.
        warnings.filterwarnings("error", "torch.distributed", FutureWarning, "musiclm_fast")
        found = dict(results(accelerator))
    facts = {"ranks": accelerator.num_processes, "type": str(accelerator.distributed_type)}
    torch.save({**found, **facts}, f"{folder}/{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
