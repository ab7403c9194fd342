"""MuLaN under accelerate and fully_shard, launched: gradients are the global batch's."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import ranks

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
        "--num_processes", str(len(ranks.SIZES)), "--main_process_port", str(port),
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    done = subprocess.run(
        [*launch, "-m", "tests.training.ranks", str(folder)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(ranks.SIZES))]


def test_accelerate_saw_all_ranks(results: list[dict[Any, Any]]) -> None:
    for found in results:
        assert found["ranks"] == len(ranks.SIZES)
        assert found["type"] == "DistributedType.MULTI_CPU"


@pytest.mark.parametrize("case", ranks.CASES, ids="-".join)
def test_gradients_are_those_of_the_global_batch(
    results: list[dict[Any, Any]], case: tuple[str, str, str]
) -> None:
    model = ranks.make(case[0])
    loss = model(*ranks.inputs(), labels=ranks.labels(case[0]))
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for found in results:
        torch.testing.assert_close(found[case]["loss"], loss.detach(), rtol=1e-11, atol=0)
        assert found[case].keys() == {"loss", *expected}
        for name, grad in expected.items():
            torch.testing.assert_close(
                found[case][name], grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("loss", ranks.LOSSES)
def test_sharded_weights_need_as_many_chunks(results: list[dict[Any, Any]], loss: str) -> None:
    for found in results:
        message = found[loss, "fully_shard", "cached", "other chunks"]
        assert message.startswith("chunk_size: ") and "[4, 2] chunks" in message
