"""The distributed losses: 2, 3 and 4 processes against one, over gloo, with uneven batches."""

from __future__ import annotations

import collections
import datetime
import itertools
import os
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_fast import _extension, testing
from musiclm_fast.ops import contrastive_loss, distributed_contrastive_loss
from musiclm_fast.ops.contrastive import _ring

KINDS = ("softmax", "decoupled", "sigmoid")
STRATEGIES = ("all_gather", "ring")
BACKENDS = ("torch", "cpp") if _extension.load() else ("torch",)
SIZES = {2: (5, 3), 3: (4, 1, 6), 4: (3, 5, 2, 4)}
EVEN = {2: (4, 4), 4: (2, 2, 2, 2)}
WITH_EMPTY = {3: (4, 0, 2)}
DEPTH, LAYERS, TIMEOUT_S = 12, 2, 120.0
SHORT_TIMEOUT_S = 4.0
PAIRS, WIDTH = 8, 16  # of a rank, where what passes is counted


def cases() -> list[tuple[int, tuple[int, ...], str, str, str]]:
    """(world, batch sizes, kind, strategy, backend)."""
    sizes = [(w, s) for table in (SIZES, EVEN, WITH_EMPTY) for w, s in table.items()]
    return [(*a, k, s, b) for a, k, s, b in itertools.product(sizes, KINDS, STRATEGIES, BACKENDS)]


def labelled_cases() -> list[tuple[int, tuple[int, ...], str, str, str]]:
    return [case for case in cases() if case[0] < 4 and case[1] != EVEN[2]]


class Encoders(nn.Module):
    """Two linear encoders and the parameters of the loss, as MuLaN has them."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.audio = nn.Parameter(torch.randn(6, LAYERS * DEPTH, generator=generator))
        self.text = nn.Parameter(torch.randn(5, LAYERS * DEPTH, generator=generator))
        self.log_temperature = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.bias = nn.Parameter(torch.tensor([-2.0, -5.0]))
        self.options = options

    def forward(self, audio: Tensor, text: Tensor, loss: Any) -> Tensor:
        latents = [
            F.normalize((x @ weight).view(len(x), LAYERS, DEPTH).transpose(0, 1), dim=-1)
            for x, weight in ((audio, self.audio), (text, self.text))
        ]
        return loss(*latents, self.log_temperature.exp(), self.bias, **self.options)


def data(total: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(total)
    return torch.randn(total, 6, generator=generator), torch.randn(total, 5, generator=generator)


def labels_of(total: int, kind: str) -> Any:
    """Of the global batch; the sigmoid loss gets one tensor for both sides."""
    sides = testing.contrastive_labels(total)
    return sides[0] if kind == "sigmoid" else sides


def part_of(labels: Any, start: int, size: int) -> Any:
    if isinstance(labels, tuple):
        return tuple(part_of(side, start, size) for side in labels)
    return labels[start : start + size]


def loss_and_gradients(model: nn.Module, *arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(*arguments)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (4,)), reshard_after_forward=True)


def what_passes(strategy: str, kind: str) -> tuple[dict[str, int], int]:
    """Bytes of a forward and backward by what they are, and how many of the other ranks' blocks
    of text a rank held at once on the ring."""
    counted: collections.Counter[str] = collections.Counter()
    blocks: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(_ring._Transfer):
        def __init__(self, ranks: Any, leaving: Tensor, arriving: Tensor, what: str) -> None:
            nonlocal most
            counted[what] += leaving.nbytes
            if what == "text":
                blocks.append(weakref.ref(arriving))
                most = max(most, sum(block() is not None for block in blocks))
            super().__init__(ranks, leaving, arriving, what)

    def watch(name: str, size_of: int) -> Any:
        call = getattr(dist, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            counted[name] += arguments[size_of].nbytes
            return call(*arguments, **options)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ring, "_Transfer", Watched)
        patch.setattr(dist, "all_reduce", watch("all_reduce", 0))
        for new, old, size_of in (
            ("all_gather_single", "all_gather_into_tensor", 0),
            ("reduce_scatter_single", "reduce_scatter_tensor", 1),
        ):
            patch.setattr(dist, new if hasattr(dist, new) else old, watch(
                new if hasattr(dist, new) else old, size_of
            ))  # fmt: skip
        latents = [F.normalize(torch.randn(PAIRS, WIDTH), dim=-1).requires_grad_() for _ in "at"]
        distributed_contrastive_loss(
            *latents, torch.ones(1), kind=kind, strategy=strategy, batch_sizes=[PAIRS] * 4
        ).backward()
    return {name.split("_single")[0].split("_tensor")[0].removesuffix("_into"): size
            for name, size in counted.items()}, most  # fmt: skip


def worker(rank: int, folder: str) -> None:
    """All cases in one start of four processes; smaller worlds are subgroups."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    groups = {world: dist.new_group(list(range(world))) for world in (2, 3)}
    results: dict[Any, Any] = {}
    every = [(False, *case) for case in cases()] + [(True, *case) for case in labelled_cases()]
    for labelled, world, sizes, kind, strategy, backend in every:
        if rank >= world:
            continue
        group = groups.get(world)
        start = sum(sizes[:rank])
        options: dict[str, Any] = dict(kind=kind, strategy=strategy, backend=backend, group=group)
        if backend == "cpp":
            options["batch_sizes"] = sizes
        if labelled:
            options["labels"] = part_of(labels_of(sum(sizes), kind), start, sizes[rank])
        model = Encoders(options)
        mine = [x[start : start + sizes[rank]] for x in data(sum(sizes))]
        found = loss_and_gradients(model, *mine, distributed_contrastive_loss)
        for name, value in found.items():
            if name != "loss":  # data parallelism's mean
                dist.all_reduce(value, group=group)
                value /= world
        results[labelled, world, sizes, kind, strategy, backend] = found

    # DistributedDataParallel itself, bfloat16 latents, and the default group.
    sizes = SIZES[4]
    start = sum(sizes[:rank])
    mine = [x[start : start + sizes[rank]] for x in data(sum(sizes))]
    for kind, strategy in itertools.product(KINDS, STRATEGIES):
        model = nn.parallel.DistributedDataParallel(
            Encoders(dict(kind=kind, strategy=strategy)), find_unused_parameters=True
        )
        found = loss_and_gradients(model, *mine, distributed_contrastive_loss)
        results["ddp", kind, strategy] = {n.removeprefix("module."): v for n, v in found.items()}
        model = fully_sharded(Encoders(dict(kind=kind, strategy=strategy)))
        found = loss_and_gradients(model, *mine, distributed_contrastive_loss)
        gradients = {n: v.full_tensor() for n, v in found.items() if n != "loss"}
        results["fully_shard", kind, strategy] = {"loss": found["loss"], **gradients}
        latents = F.normalize(torch.ones(sizes[rank], 4) + rank, dim=-1).bfloat16()
        results["bfloat16", kind, strategy] = distributed_contrastive_loss(
            latents, latents, torch.ones(1), kind=kind, strategy=strategy
        )

    eye = torch.eye(4)
    one = torch.ones(1)
    results["local"] = distributed_contrastive_loss(eye, eye * rank, one, strategy="local")
    results["width differs"] = error_of(
        lambda: distributed_contrastive_loss(*[torch.ones(2, 3 + rank % 2)] * 2, one)
    )
    results["kind differs"] = error_of(
        lambda: distributed_contrastive_loss(eye, eye, one, kind=KINDS[rank % 2])
    )
    results["labels on some ranks"] = [
        error_of(
            lambda s=strategy: distributed_contrastive_loss(
                eye, eye, one, strategy=s, labels=torch.arange(4) if rank % 2 else None
            )
        )
        for strategy in STRATEGIES
    ]
    results["a label of its own"] = error_of(
        lambda: distributed_contrastive_loss(
            eye, eye, one, labels=(torch.arange(4), torch.tensor([0, 1, 2, 3 + rank]))
        )
    )
    # Each rank has positives of its own alone, and negatives on the other ranks.
    results["one clip a rank"] = distributed_contrastive_loss(
        eye, eye * 2, one, kind="decoupled", labels=torch.full((4,), rank)
    )
    results["local, labels"] = distributed_contrastive_loss(
        eye, eye * rank, one, strategy="local", labels=torch.tensor([0, 0, 1, 1])
    )
    results["wrong sizes"] = error_of(
        lambda: distributed_contrastive_loss(eye, eye, one, batch_sizes=[4, 4])
    )
    results["decoupled alone"] = error_of(
        lambda: distributed_contrastive_loss(
            *[torch.ones(int(rank == 0), 3)] * 2, one, kind="decoupled"
        )
    )
    for strategy, kind in itertools.product(STRATEGIES, KINDS):
        results["passes", strategy, kind] = what_passes(strategy, kind)

    # Rank 3 is alive but does not come before the others have given up.
    timeout = datetime.timedelta(seconds=SHORT_TIMEOUT_S)
    for strategy in STRATEGIES:
        group = dist.new_group(list(range(4)), timeout=timeout)
        dist.barrier()
        gave_up = [Path(folder, f"gave up {strategy} {other}") for other in range(3)]
        if rank == 3:
            while not all(path.exists() for path in gave_up):
                time.sleep(0.05)
            continue
        results["late", strategy] = error_of(
            lambda s=strategy, g=group: distributed_contrastive_loss(
                eye, eye, one, strategy=s, batch_sizes=[4, 4, 4, 4], group=g
            )
        )
        gave_up[rank].touch()

    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    if rank == 3:
        os._exit(0)  # dies without a word
    deaths = {}
    for strategy in STRATEGIES:
        deaths[strategy] = error_of(lambda s=strategy: distributed_contrastive_loss(
            eye, eye, one, strategy=s, batch_sizes=[4, 4, 4, 4]
        ))  # fmt: skip
    torch.save(deaths, f"{folder}/death{rank}.pt")
    os._exit(0)  # no tidy goodbye to a rank that is gone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(path),), nprocs=4, join=True)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def one_process(total: int, kind: str, labelled: bool = False) -> dict[str, Tensor]:
    """The truth: one process with the global batch, in float64."""
    labels = labels_of(total, kind) if labelled else None
    model = Encoders(dict(kind=kind, labels=labels, backend="torch")).double()
    return loss_and_gradients(model, *(x.double() for x in data(total)), contrastive_loss)


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_equal_one_process(
    results: list[dict[Any, Any]], world: int, kind: str, strategy: str
) -> None:
    for case_world, sizes, case_kind, case_strategy, backend in cases():
        if (case_world, case_kind, case_strategy) != (world, kind, strategy):
            continue
        expected = one_process(sum(sizes), kind)
        for rank in range(world):
            check(results[rank][False, world, sizes, kind, strategy, backend], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_labels_mean_the_same_on_all_ranks(
    results: list[dict[Any, Any]], world: int, kind: str, strategy: str
) -> None:
    for case_world, sizes, case_kind, case_strategy, backend in labelled_cases():
        if (case_world, case_kind, case_strategy) != (world, kind, strategy):
            continue
        expected = one_process(sum(sizes), kind, labelled=True)
        assert abs(expected["loss"] - one_process(sum(sizes), kind)["loss"]) > 0.1
        for rank in range(world):
            check(results[rank][True, world, sizes, kind, strategy, backend], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_distributed_data_parallel(results: list[dict[Any, Any]], kind: str, strategy: str) -> None:
    expected = one_process(sum(SIZES[4]), kind)
    for rank in range(4):
        check(results[rank]["ddp", kind, strategy], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_fully_shard(results: list[dict[Any, Any]], kind: str, strategy: str) -> None:
    """FSDP as torch has it on CPUs; its predecessor FullyShardedDataParallel wants a GPU."""
    expected = one_process(sum(SIZES[4]), kind)
    for rank in range(4):
        check(results[rank]["fully_shard", kind, strategy], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ring_holds_two_neighbours_blocks(results: list[dict[Any, Any]], kind: str) -> None:
    for result in results:
        assert result["passes", "ring", kind][1] == 2  # of three: one in use, one in flight


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_on_paper(results: list[dict[Any, Any]], kind: str) -> None:
    """The table in the op's README, from its formulas with W = 4 and float32 latents."""
    world, block, column = 4, PAIRS * WIDTH * 4, PAIRS * 4
    if kind == "sigmoid":
        ring = dict(text=(world - 1) * block, gradient=world * block)
        gather = dict(all_gather=world * block, reduce_scatter=world * block, all_reduce=4)
    else:
        ring = dict(
            text=2 * (world - 1) * block, statistics=world * column,
            facts=(world - 1) * 2 * column, gradient=world * block,
        )  # fmt: skip
        gather = dict(
            all_gather=world * (block + column), reduce_scatter=world * block,
            all_reduce=2 * world * column + 4,
        )  # fmt: skip
    for result in results:
        assert result["passes", "ring", kind][0] == {**ring, "all_reduce": 4}  # the loss
        assert result["passes", "all_gather", kind][0] == gather


def test_bfloat16_latents(results: list[dict[Any, Any]]) -> None:
    latents = torch.cat([torch.ones(size, 4) + rank for rank, size in enumerate(SIZES[4])])
    latents = F.normalize(latents, dim=-1).bfloat16()
    for kind, strategy in itertools.product(KINDS, STRATEGIES):
        expected = contrastive_loss(latents, latents, torch.ones(1), kind=kind)
        for rank in range(4):
            torch.testing.assert_close(results[rank]["bfloat16", kind, strategy], expected)


def test_local_losses_see_their_own_pairs_alone(results: list[dict[Any, Any]]) -> None:
    eye = torch.eye(4)
    for rank in range(4):
        expected = contrastive_loss(eye, eye * rank, torch.ones(1))
        torch.testing.assert_close(results[rank]["local"], expected)


def test_labels_of_one_clip_a_rank(results: list[dict[Any, Any]]) -> None:
    eye = torch.eye(4).repeat(4, 1)
    labels = torch.arange(4).repeat_interleave(4)
    expected = contrastive_loss(eye, eye * 2, torch.ones(1), kind="decoupled", labels=labels)
    for rank in range(4):
        torch.testing.assert_close(results[rank]["one clip a rank"], expected)
        local = contrastive_loss(
            eye[:4], eye[:4] * rank, torch.ones(1), labels=torch.tensor([0, 0, 1, 1])
        )
        torch.testing.assert_close(results[rank]["local, labels"], local)


def test_ranks_that_disagree_say_so(results: list[dict[Any, Any]]) -> None:
    for result in results:
        for message in result["labels on some ranks"]:
            assert message.startswith("ValueError") and "another presence of labels" in message
        assert "labels: got 3 text labels without audio (4, 5, 6)" in result["a label of its own"]
        assert (
            result["width differs"].startswith("ValueError") and "width" in result["width differs"]
        )
        assert result["kind differs"].startswith("ValueError") and "kind" in result["kind differs"]
        assert "batch_sizes" in result["wrong sizes"]
        assert "1 pair on all ranks" in result["decoupled alone"]


def test_a_dead_rank_ends_the_others(folder: Path, results: list[dict[Any, Any]]) -> None:
    for rank in range(3):
        for message in torch.load(folder / f"death{rank}.pt").values():
            assert message.startswith("RuntimeError: contrastive loss: rank")
            assert "has died" in message


def test_a_rank_that_does_not_come_ends_the_others(results: list[dict[Any, Any]]) -> None:
    for strategy in STRATEGIES:
        for result in results[:3]:
            message = result["late", strategy]
            assert message.startswith("RuntimeError: contrastive loss: rank"), message
            assert "did not answer within the group's timeout" in message


def test_several_ranks_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, factor = torch.eye(4), torch.ones(1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 8.*init_process_group"):
        distributed_contrastive_loss(latents, latents, factor)
    alone = distributed_contrastive_loss(latents, latents, factor, strategy="local")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for strategy in STRATEGIES:
        loss = distributed_contrastive_loss(latents, latents, factor, strategy=strategy)
        assert torch.equal(loss, alone)
    with pytest.raises(ValueError, match="strategy"):
        distributed_contrastive_loss(latents, latents, factor, strategy="gossip")
