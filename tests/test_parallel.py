"""The runner of tests in several processes, on small files of tests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.parallel", "-n", "2", *arguments]


def run(tmp_path: Path, tests: str, *arguments: str) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The finished process, its report, and every test's outcome."""
    path, report = tmp_path / "test_it.py", tmp_path / "reports" / "report.json"
    path.write_text(tests)
    done = subprocess.run(
        command("--report", str(report), str(path), *arguments),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(report.read_text()) if report.exists() else {}
    return done, found, outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    lines = report.with_suffix(".jsonl").read_text().splitlines()
    tests = [json.loads(line) for line in lines]
    assert len({test["id"] for test in tests}) == len(tests)  # each once
    return {test["id"].rpartition("::")[2]: test["outcome"] for test in tests}


def test_every_test_runs_once_and_is_reported(tmp_path: Path) -> None:
    tests = """
import os, pytest
@pytest.fixture(scope="module")
def shared(): yield 1
class TestMany:
    @pytest.fixture(scope="class")
    def own(self): yield 2
    @pytest.mark.parametrize("n", range(20))
    def test_passes(self, n, shared, own): assert os.environ["OMP_NUM_THREADS"] == "1"
def test_fails(): assert 1 == 2, "not so"
def test_skips(): pytest.skip("no reason")
@pytest.mark.xfail
def test_expected(): assert False
@pytest.fixture
def broken(): yield; raise RuntimeError("afterwards")
def test_teardown(broken): pass
"""
    done, report, found = run(tmp_path, tests)
    assert done.returncode == 1, done.stdout + done.stderr
    assert found.pop("test_fails") == "failed"
    assert found.pop("test_skips") == "skipped"
    assert found.pop("test_expected") == "xfailed"
    assert found.pop("test_teardown") == "error"
    assert set(found.values()) == {"passed"} and len(found) == 20
    assert report["collected"] == 24
    assert report["counts"] == dict(passed=20, failed=1, skipped=1, xfailed=1, error=1)
    assert {f["id"].rpartition("::")[2] for f in report["failures"]} == {
        "test_fails", "test_teardown",
    }  # fmt: skip
    assert len(report["slowest"]) == 10 and report["running"] == []
    for words in (
        "not so",
        "afterwards",
        "skipped 1: no reason",
        "test_fails: AssertionError: not so",
    ):
        assert words in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "20 passed" in last and "1 failed" in last and last.endswith(" s")
    assert run(tmp_path, tests, "-k", "passes")[0].returncode == 0


def test_a_process_that_dies_fails_its_test_alone(tmp_path: Path) -> None:
    tests = """
import os, pytest
@pytest.mark.parametrize("n", range(12))
def test_one(n):
    if n in (2, 5, 6): os._exit(0)
"""
    done, report, found = run(tmp_path, tests)
    assert done.returncode == 1
    dead = {name for name, outcome in found.items() if outcome == "died"}
    assert dead == {"test_one[2]", "test_one[5]", "test_one[6]"}
    assert len(found) == 12 and report["counts"] == dict(passed=9, died=3)
    assert "its process died: exit status 0" in done.stdout


@pytest.mark.parametrize(
    ("message", "processes"),
    [
        ("CUDA error: an illegal memory access was encountered", 13),
        ("Triton Error [CUDA]: device-side assert triggered", 13),
        ("CUDA out of memory. Tried to allocate 2 GiB", 2),
    ],
)
def test_after_a_cuda_error_a_process_runs_nothing_more(
    tmp_path: Path, message: str, processes: int
) -> None:
    tests = f"""
import os, pytest
@pytest.mark.parametrize("n", range(12))
def test_one(n):
    with open({str(tmp_path / "pids")!r}, "a") as file: file.write(f"{{os.getpid()}}\\n")
    raise RuntimeError({message!r})
"""
    done, report, _ = run(tmp_path, tests)
    assert done.returncode == 1
    assert report["counts"] == dict(failed=12)
    used = set((tmp_path / "pids").read_text().split())
    assert len(used) == min(processes, 12) or processes == 2 >= len(used)


def test_what_pytest_refuses_is_passed_on(tmp_path: Path) -> None:
    done, *_ = run(tmp_path, "def test_a(): pass", "-k", "nothing")
    assert done.returncode == 5
    done, *_ = run(tmp_path, "def test_a(): pass", "--no-such-option")
    assert done.returncode == 4 and "--no-such-option" in done.stdout
    done, *_ = run(tmp_path, "import no_such_module")
    assert done.returncode == 2 and "no_such_module" in done.stdout
    done = subprocess.run([*command(), "-n", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "-n: got 0" in done.stderr


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path: Path, by: int) -> None:
    path, report = tmp_path / "test_it.py", tmp_path / "report.json"
    path.write_text(f"""
import os, time, pytest
@pytest.mark.parametrize("n", range(6))
def test_one(n):
    if n == 3:
        with open({str(tmp_path / "pid")!r}, "w") as file: file.write(f"{{os.getpid()}}\\n")
        time.sleep(600)
""")
    process = subprocess.Popen(
        command("--report", str(report), str(path)), cwd=ROOT, stdout=subprocess.PIPE, text=True,
        # A shell without job control starts what it puts in the background with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    jsonl, pid, until = report.with_suffix(".jsonl"), tmp_path / "pid", time.monotonic() + 120
    while not pid.exists() or jsonl.read_text().count("\n") < 5:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(by)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + by
    assert "running when cut off" in out
    assert out.splitlines()[-1].startswith("cut off: 5 passed, 1 not run")
    (running,) = json.loads(report.read_text())["running"]
    assert running.endswith(f"{path.name}::test_one[3]")
    assert not Path("/proc", pid.read_text().strip()).exists()
