"""What every benchmark shares: interleaved timing, peak memory of a fresh process, environment."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over all rounds of an interleaved run."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    contenders: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1
) -> dict[str, Timing]:
    """Time the contenders in turn, A B A B ..., so that a drifting machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + rounds):
        for name, run in contenders.items():
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: Timing(seconds) for name, seconds in times.items()}


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Median, least and greatest of the ratio round by round."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def high_water() -> int:
    """Peak resident memory of this process so far, in bytes.

    Of its own memory: getrusage's figure starts at that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def current() -> int:
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def extra_memory(build: Callable[[], Callable[[], Any]]) -> int:
    """High-water mark of ``build()()`` over what is resident once it is built, in bytes.

    Call it once, in a fresh process (:func:`in_fresh_process`): what an earlier run left resident
    would hide what this one needs.
    """
    run = build()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = current()
    run()
    return max(0, high_water() - before)


def in_fresh_process(module: str, *arguments: str, timeout: float = 1800) -> Any:
    """Run ``python -m module arguments``, whose last line of output is JSON; return that."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment() -> dict[str, str]:
    """Device, versions, commit and date: what a table of results must state."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        model = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        device = f"{model[0] if model else platform.processor()}, {torch.get_num_threads()} threads"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = {}
    for name in ("torch", "triton", "musiclm-pytorch", "audiolm-pytorch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": device,
        "python": platform.python_version(),
        **versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }
