"""Checkpoints of a run: complete or absent, and a resumed run equals one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from musiclm_fast import MuLaN
from musiclm_fast._checkpoint import CheckpointError, read_checkpoint
from musiclm_fast.models.checkpoint import load_mulan
from musiclm_fast.training.run_folder import RunFolder
from tests.training.runs import Noisy, make_mulan, make_trainer

ROOT = Path(__file__).resolve().parents[2]


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.is_dir() and not path.is_symlink())


def same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def same_run(a: Path, b: Path) -> None:
    """The last checkpoints of both hold the same bits: weights, averages, optimizer, chance."""
    same_weights(MuLaN.from_pretrained(a / "latest"), MuLaN.from_pretrained(b / "latest"))
    ours, theirs = (read_checkpoint(run / "latest" / "trainer.pt") for run in (a, b))
    for state in (ours, theirs):
        assert state.pop("seconds") > 0
    assert flat(ours) == flat(theirs)


def flat(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


CHOICES: dict[str, dict[str, Any]] = {
    "AdamW, cosine, average, accumulation": {},
    "upstream's defaults": dict(
        optimizer=None, weight_decay=0, schedule="constant", warmup_steps=0, ema_decay=None,
        grad_accum_every=1,
    ),
    "Lion, gradient caching": dict(
        optimizer="lion", grad_cache_chunk=3, grad_accum_every=1, ema_decay=None
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", CHOICES.values(), ids=CHOICES)
def test_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    """Stopped at step 5, resumed from step 3: everything that is saved has the same bits."""
    make_trainer(tmp_path / "whole", **options).train()
    stopped = make_trainer(tmp_path / "parts", **options)
    for _ in range(5):
        stopped.train_step()
    torch.manual_seed(99)
    random.seed(99)
    make_trainer(tmp_path / "parts", resume=True, **options).train()
    assert folders(tmp_path / "parts") == ["mulan.3", "mulan.6", "mulan.8"]
    same_run(tmp_path / "whole", tmp_path / "parts")
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    losses = [
        [(e["step"], e["train_loss"]) for e in map(json.loads, lines) if "train_loss" in e]
        for lines in logs
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 9))


def test_a_kill_during_a_save(tmp_path: Path) -> None:
    """The process dies in the middle of writing weights: the next one goes on from before."""
    code = """
import os, signal, sys
from pathlib import Path
import torch
from musiclm_fast.training import mulan
from tests.training.runs import make_trainer

torch.set_num_threads(1)
write, calls = mulan.write_weights, []
def dies_at_the_second(model, path):
    calls.append(path)
    if len(calls) == 2:
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(model, path)
mulan.write_weights = dies_at_the_second
make_trainer(Path(sys.argv[1]), resume=True).train()
"""
    run = tmp_path / "parts"
    done = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in RunFolder(run).checkpoints().values()] == ["mulan.3"]
    assert any(name.endswith(".tmp") for name in os.listdir(run))
    make_trainer(run, resume=True).train()
    assert not any(name.endswith(".tmp") for name in os.listdir(run))
    make_trainer(tmp_path / "whole").train()
    same_run(tmp_path / "whole", run)


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL ten times, whatever the process is doing; then the end, bit for bit."""
    options = dict(num_train_steps=400, save_model_every=4, keep_last=2, valid_every=8)
    generator = random.Random(0)  # the moments still differ: no run is as fast as another
    run, kills = tmp_path / "killed", 0

    def start() -> subprocess.Popen[bytes]:
        # A step takes at least 8 ms, so that ten kills come before the end on any machine.
        given = json.dumps(options | dict(pause=0.001))
        command = [sys.executable, "-m", "tests.training.runs", str(run), given]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def last_step() -> int:
        log = run / "log.jsonl"
        lines = log.read_bytes().split(b"\n")[:-1] if log.is_file() else []
        return json.loads(lines[-1])["step"] if lines else 0

    while kills < 10:
        at = max(RunFolder(run).checkpoints(), default=0)
        RunFolder(run).cut_log(at)
        process, goal = start(), at + generator.randrange(1, 25)
        while last_step() < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.03))
        assert process.poll() is None, "finished before ten kills"
        process.kill()
        process.wait()
        kills += 1
    last = start()
    assert last.wait(timeout=1000) == 0, last.stderr and last.stderr.read()
    make_trainer(tmp_path / "whole", **options).train()
    same_run(tmp_path / "whole", run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB: one checkpoint of the tiny model, not two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    trainer = make_trainer(small_disk / "run", save_model_every=2)
    with pytest.raises(
        OSError, match=r"step 4: .*(disk full|No space left).*; .*mulan\.2 is as it was"
    ):
        trainer.train()
    assert os.listdir(small_disk / "run" / "mulan.2") != []
    assert not [name for name in os.listdir(small_disk / "run") if name.endswith(".tmp")]
    load_mulan(small_disk / "run" / "latest")
    assert make_trainer(small_disk / "run", resume=True, save_model_every=2).step == 2


def test_a_log_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Training goes on without it, and says so once."""
    trainer = make_trainer(tmp_path)

    def full(entry: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.run, "log", full)
    trainer.train()
    assert trainer.step == 8
    assert capsys.readouterr().out.count("the log cannot be written") == 1


@pytest.mark.parametrize("part", ["model.safetensors", "trainer.pt"])
def test_a_file_that_cannot_be_written(part: str, tmp_path: Path) -> None:
    """Every size at which a file may grow too large; the earlier checkpoint stays and loads."""
    trainer = make_trainer(tmp_path)
    for _ in range(3):
        trainer.train_step()
    whole = (tmp_path / "mulan.3" / part).stat().st_size
    before = {path: path.read_bytes() for path in (tmp_path / "mulan.3").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole - 1000, hard))
    try:
        with pytest.raises(OSError, match=r"mulan\.3 is as it was"):
            trainer._checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in (tmp_path / "mulan.3").iterdir()} == before
    assert folders(tmp_path) == ["mulan.3"]


# ---- which checkpoints stay


def save_all(run: RunFolder, scores: dict[int, float | None]) -> list[int]:
    for step, score in scores.items():

        def write(folder: Path) -> None:
            for name in ("model.safetensors", "config.json", "trainer.pt"):
                (folder / name).touch()

        run.save(step, score, write)
    return list(run.checkpoints())


SCORES: dict[int, float | None] = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 3.0, 6: 2.0, 7: float("nan")}


def test_nothing_is_deleted_unasked(tmp_path: Path) -> None:
    assert save_all(RunFolder(tmp_path), SCORES) == [1, 2, 3, 4, 5, 6, 7]
    assert os.readlink(tmp_path / "latest") == "mulan.7"
    assert os.readlink(tmp_path / "best") == "mulan.2"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(keep_last=1), [2, 7]),
        (dict(keep_last=2, keep_best=2), [2, 6, 7]),
        (dict(keep_last=1, keep_best=0), [7]),
        (dict(keep_last=1, keep_best=2, higher_is_better=True), [1, 3, 7]),
    ],
)
def test_what_is_kept(options: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    (tmp_path / "mulan.notes").mkdir()
    (tmp_path / "mulan.9").mkdir()  # holds none of the files: not a checkpoint
    run = RunFolder(tmp_path, **options)
    assert save_all(run, SCORES) == kept
    assert folders(tmp_path) == sorted(
        [*(f"mulan.{step}" for step in kept), "mulan.9", "mulan.notes"]
    )
    assert not set(run.scores) - set(kept)


def test_another_runs_checkpoints_are_not_pruned(tmp_path: Path) -> None:
    save_all(RunFolder(tmp_path), {10: 1.0, 20: 1.0})
    assert save_all(RunFolder(tmp_path, keep_last=1), {1: None, 2: None}) == [2, 10, 20]
    assert RunFolder(tmp_path).latest() == tmp_path / "mulan.2"


def test_validation_decides_the_best(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_model_every=2, valid_every=4, best_by="valid_recall@5")
    trainer.train()
    assert set(trainer.run.scores) == {4, 8}
    best = max((4, 8), key=lambda step: (trainer.run.scores[step], -step))
    assert os.readlink(tmp_path / "best") == f"mulan.{best}"
    resumed = make_trainer(
        tmp_path, save_model_every=2, valid_every=4, best_by="valid_recall@5", resume=True
    )
    assert resumed.run.scores == trainer.run.scores


# ---- what a checkpoint is


def test_a_checkpoint_is_a_model_for_others(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, extra={"clip_seconds": 0.05})
    trainer.train()
    model, extra = load_mulan(tmp_path / "latest")
    assert extra == {"clip_seconds": 0.05}
    same_weights(model, trainer.average.module)
    state = read_checkpoint(tmp_path / "latest" / "trainer.pt")
    assert all(
        torch.equal(v, state["weights"][k]) for k, v in trainer.unwrapped.state_dict().items()
    )


def test_load_takes_folders_and_files(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a")
    for _ in range(3):
        trainer.train_step()
    for name in ("copy", "copy.pt"):
        trainer.save(tmp_path / name)
        other = make_trainer(tmp_path / "b")
        other.load(tmp_path / name)
        assert other.step == 3
        same_weights(other.unwrapped, trainer.unwrapped)


def test_an_earlier_run_is_not_mixed_in(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match=r"results_folder: .*earlier run.*mulan\.8.*resume=True"):
        make_trainer(tmp_path).train()
    assert folders(tmp_path) == ["mulan.3", "mulan.6", "mulan.8"]
    loaded = make_trainer(tmp_path)
    loaded.load(tmp_path / "mulan.6")
    loaded.train_step()
    make_trainer(tmp_path, force_clear_prev_results=True)
    assert folders(tmp_path) == []


def test_another_run_is_named_by_its_options(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    for change, message in (
        (dict(lr=0.5), r"lr = 0\.001, not 0\.5\); choose another folder"),
        (dict(batch_size=3), "batch_size = 4, not 3"),
        (dict(num_train_steps=99), "num_train_steps = 8, not 99"),
        (
            dict(mulan=make_mulan(sigmoid_contrastive_loss=True)),
            "sigmoid_contrastive_loss = F",
        ),
        (dict(dataset=Noisy(25)), "rows of the dataset = 16, not 20"),
    ):
        with pytest.raises(CheckpointError, match=message):
            make_trainer(tmp_path, resume=True, **change)
    make_trainer(tmp_path, resume=True, num_workers=1, log_every=3, keep_last=1)  # no other result


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "trainer.pt"])
def test_damaged_checkpoints(part: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    for _ in range(3):
        trainer.train_step()
    path = tmp_path / "mulan.3" / part
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=rf"{part}.*(damaged|no checkpoint)"):
        make_trainer(tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        make_trainer(tmp_path / "other").load(tmp_path / "none")


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    make_trainer(tmp_path / "a").save(tmp_path / "saved")
    other = make_trainer(tmp_path / "b", mulan=make_mulan(audio=dict(patch_size=8)))
    with pytest.raises(CheckpointError, match="another architecture"):
        other.load(tmp_path / "saved")


def test_custom_towers_are_trained_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """No configuration rebuilds a class of one's own, but its run goes on."""

    def own() -> MuLaN:
        mulan = make_mulan()
        mulan.text.__class__ = type("MyText", (type(mulan.text),), {})
        return mulan

    make_trainer(tmp_path, mulan=own()).train()
    assert "will not rebuild the model by themselves" in capsys.readouterr().out
    assert make_trainer(tmp_path, mulan=own(), resume=True).step == 8
    with pytest.raises(CheckpointError, match=r"does not say how to build one .*MyText"):
        MuLaN.from_pretrained(tmp_path / "latest")
