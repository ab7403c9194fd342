"""Runs tests in several processes with nothing but pytest: ``python -m tests.parallel``.

    python -m tests.parallel [-n PROCESSES] [--report FILE.json] [pytest arguments]

Every process collects all tests and claims them one by one, by creating a file. What has finished
is written at once, so that a run that is cut off has lost nothing. A process that dies counts as a
failure of the test that it ran, and one that met a CUDA error, after which every call fails, ends;
a fresh one takes its place.

The exit status is pytest's: 0, 1 after a failure, 5 where there is no test; what pytest itself says
of bad arguments and of tests that cannot be imported is passed on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDER = "MUSICLM_FAST_TESTS_FOLDER"  # tells a process where claims and results are
RESULTS = "MUSICLM_FAST_TESTS_RESULTS"
NUMBER = "MUSICLM_FAST_TESTS_NUMBER"
POISONED = 77  # exit status of a process that met a CUDA error
STICKY = ("CUDA error", "Triton Error [CUDA]")
TEXT = 6000  # characters kept of a failure, from its end
LOST = ("failed", "error", "died")


class Worker:
    """The pytest plugin of one process."""

    def __init__(self) -> None:
        self.folder, self.results = Path(os.environ[FOLDER]), os.environ[RESULTS]
        self.running = self.folder / f"running-{os.environ[NUMBER]}"
        self.parent = os.getppid()
        self.reports: list[Any] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        option = session.config.option
        broken = session.testsfailed and not option.continue_on_collection_errors
        if session.items and not broken and not option.collectonly:
            write(self.folder / "collected", str(len(session.items)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if os.getppid() != self.parent:  # killed: nobody waits for the rest
            os._exit(1)
        name = hashlib.sha1(item.nodeid.encode()).hexdigest()
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True
        self.running.write_text(item.nodeid)
        self.reports = []
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        # The test before kept fixtures for the next one in order, which another process may have.
        item.session._setupstate.teardown_exact(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, text = "passed", ""
        for report in self.reports:
            if report.failed:
                outcome = "failed" if report.when == "call" else "error"
                text += report.longreprtext
            elif report.skipped:
                outcome = "xfailed" if hasattr(report, "wasxfail") else "skipped"
                if isinstance(report.longrepr, tuple):
                    text = report.longrepr[2].removeprefix("Skipped: ")
            elif report.when == "call" and hasattr(report, "wasxfail"):
                outcome = "xpassed"
        seconds = sum(report.duration for report in self.reports)
        append(self.results, nodeid, outcome, seconds, text)
        self.running.unlink()
        if outcome in LOST and any(words in text for words in STICKY):
            os._exit(POISONED)  # a clean end would call CUDA again


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Worker())


def append(path: str, test: str, outcome: str, seconds: float, text: str = "") -> None:
    line = dict(id=test, outcome=outcome, seconds=round(seconds, 3), text=text[-TEXT:])
    data = json.dumps(line).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, data)  # one call: lines of several processes do not mix
    os.close(file)


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


class Run:
    """The parent's side: starts processes, follows the results, reports."""

    def __init__(self, arguments: list[str], folder: Path, report: Path | None) -> None:
        self.arguments, self.folder, self.report = arguments, folder, report
        results = folder / "results.jsonl" if report is None else report.with_suffix(".jsonl")
        self.results = results.resolve()
        self.results.parent.mkdir(parents=True, exist_ok=True)
        self.results.write_bytes(b"")
        self.read = 0
        self.tests: list[dict[str, Any]] = []
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.started = 0
        self.status = 0  # of a process whose end no test explains
        self.begin = self.said = time.monotonic()

    def start(self) -> None:
        self.started += 1
        environ = {
            "OMP_NUM_THREADS": "1", **os.environ, FOLDER: str(self.folder),
            RESULTS: str(self.results), NUMBER: str(self.started),
        }  # fmt: skip
        plugins = ["-p", "no:cacheprovider", "-p", "tests.parallel"]
        with self.log(self.started).open("wb") as log:
            self.processes[self.started] = subprocess.Popen(
                [sys.executable, "-m", "pytest", *plugins, *self.arguments],
                env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def log(self, number: int) -> Path:
        return self.folder / f"log-{number}"

    @property
    def collected(self) -> int:
        path = self.folder / "collected"
        return int(path.read_text()) if path.exists() else 0

    def follow(self) -> None:
        """Read and show what has finished since."""
        with self.results.open("rb") as file:
            file.seek(self.read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read += len(whole)
        new = [json.loads(line) for line in whole.splitlines()]
        self.tests += new
        for test in new:
            if test["outcome"] in LOST:
                lines = test["text"].strip().splitlines()
                reason = next((x[1:].strip() for x in lines if x.startswith("E ")), lines[-1])
                print(f"{test['outcome'].upper()} {test['id']}: {reason}", flush=True)
        if time.monotonic() - self.said > 5:
            self.said = time.monotonic()
            print(f"{len(self.tests)} of {self.collected} tests, {self.seconds:.0f} s", flush=True)
            self.save()

    def ended(self, number: int, status: int) -> None:
        """Take note of the end of a process, and replace it where tests may be left."""
        running = self.folder / f"running-{number}"
        if running.exists():
            tail = self.log(number).read_text(errors="replace")[-TEXT // 2 :]
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            text = f"{tail}\nits process died: {how}"
            append(str(self.results), running.read_text(), "died", 0.0, text)
            running.unlink()
        elif status in (0, 1, POISONED):
            if status == 1 and not any(t["outcome"] in LOST for t in self.tests):
                self.status = 1  # such as an error in a session's last fixture
                print(self.log(number).read_text(errors="replace"), end="")
            if status != POISONED:
                return
        else:
            self.status = status if status > 0 else 3
            print(self.log(number).read_text(errors="replace"), end="")
            return
        self.start()

    def wait(self) -> int | None:
        """Until every process has ended; the exit status where none of them ran a test."""
        while self.processes:
            time.sleep(0.05)
            for number, process in list(self.processes.items()):
                status = process.poll()
                if status is None:
                    continue
                del self.processes[number]
                self.follow()
                if not self.collected:
                    print(self.log(number).read_text(errors="replace"), end="")
                    return status if status >= 0 else 3
                self.ended(number, status)
            self.follow()
        return None

    def kill(self) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes.values():  # a process on a GPU takes a while to go
            process.wait()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [test for test in self.tests if test["outcome"] in LOST]

    @property
    def slowest(self) -> list[dict[str, Any]]:
        ordered = sorted(self.tests, key=lambda test: -test["seconds"])[:10]
        return [{name: test[name] for name in ("id", "seconds")} for test in ordered]

    def save(self, running: list[str] | None = None) -> None:
        if self.report is None:
            return
        content = dict(
            arguments=self.arguments, seconds=round(self.seconds, 1), collected=self.collected,
            counts=Counter(test["outcome"] for test in self.tests), failures=self.failures,
            slowest=self.slowest, running=running or [],
        )  # fmt: skip
        write(self.report, json.dumps(content, indent=1) + "\n")

    def finish(self, cut_off: str = "") -> int:
        """The summary, and the exit status."""
        self.follow()
        running = [path.read_text() for path in self.folder.glob("running-*")]
        self.save(running)
        for test in self.failures:
            print(f"\n---- {test['id']}\n{test['text']}")
        print("\nslowest:")
        for test in self.slowest:
            print(f"{test['seconds']:8.2f} s  {test['id']}")
        reasons = Counter(test["text"] for test in self.tests if test["outcome"] == "skipped")
        for reason, count in reasons.most_common():
            print(f"skipped {count}: {reason}")
        for test_id in running:
            print(f"running when cut off: {test_id}")
        counts = Counter(test["outcome"] for test in self.tests)
        counts["not run"] = self.collected - len(self.tests)
        said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
        print(f"{cut_off}{said or 'no test'} in {self.seconds:.1f} s")
        return self.status or int(bool(self.failures) or counts["not run"] > 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parallel", add_help=False, allow_abbrev=False,
        usage="%(prog)s [-n PROCESSES] [--report FILE.json] [pytest arguments]",
    )  # fmt: skip
    parser.add_argument("-n", type=int, default=min(max((os.cpu_count() or 1) - 2, 1), 14))
    parser.add_argument("--report", type=Path)
    options, arguments = parser.parse_known_args(argv)
    if options.n < 1:
        parser.error(f"-n: got {options.n}, expected at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as name:
        run = Run(arguments, Path(name), options.report)
        try:
            for _ in range(options.n):
                run.start()
            status = run.wait()
        except (KeyboardInterrupt, SystemExit) as stop:
            run.kill()
            run.finish("cut off: ")
            return stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT
        finally:
            run.kill()
        return run.finish() if status is None else status


if __name__ == "__main__":
    sys.exit(main())
