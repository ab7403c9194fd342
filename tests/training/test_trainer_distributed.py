"""Two processes over gloo, as torchrun starts them, against one with the global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from musiclm_fast._checkpoint import read_checkpoint
from musiclm_fast.models.checkpoint import load_mulan
from tests.training.distributed_runs import SCENARIOS, trainer_of

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(arguments: list[str], processes: int = 2) -> list[str]:
    """Run a program in several processes with torchrun's environment; what each printed."""
    port, threads = free_port(), 1
    shared = dict(
        WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=threads
    )
    running = []
    for rank in range(processes):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        running.append(
            subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, text=True,
                env={**os.environ, **{name: str(value) for name, value in own.items()}},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    said = []
    for process in running:
        try:
            said.append(process.communicate(timeout=1000)[0])
        finally:
            process.kill()
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text[-3000:]
    return said


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(["-m", "tests.training.distributed_runs", str(folder)])
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_are_one(name: str, both: Path, tmp_path: Path) -> None:
    """The same losses, validation, weights and averages, within rounding; resumed on the way."""
    trainer_of(tmp_path, name, 1).train()
    runs = [folder / name for folder in (tmp_path, both)]
    logs = [[json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    for alone, shared in zip(*logs, strict=True):
        assert alone.keys() == shared.keys()
        for key in alone.keys() - {"samples/s", "s audio/s"}:
            assert shared[key] == pytest.approx(alone[key], rel=1e-6), (alone["step"], key)
    ours, theirs = (load_mulan(run / "latest")[0].double().state_dict() for run in runs)
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-7, atol=1e-9, msg=key)
    state = read_checkpoint(runs[1] / "latest" / "trainer.pt")
    assert state["step"] == 8
    assert len(state["random"]) == state["options"]["processes"] == 2
    seeds = [own["torch"] for own in state["random"]]
    assert not torch.equal(*seeds), "each process draws its own masks"
