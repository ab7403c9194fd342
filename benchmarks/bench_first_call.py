"""Time of the first training step in a new process: imports, construction, compiled kernels.

Each row is a fresh interpreter; its time runs from the start of that interpreter to the end of the
first step of MuLaN. On a GPU it runs with an empty cache of Triton's kernels, then with the filled
cache. The second step of the same process is a case of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks import harness
from benchmarks.harness import Result, Settings

JOB = "first call"


def first_step(kind: str, asked: str, device: str) -> dict[str, float]:
    """Seconds since this process began, at the end of the first step, and those of the second."""
    from benchmarks import bench_training_step as bench

    run = bench.step(kind, bench.Case(**json.loads(asked)), device)

    def once() -> None:
        run()
        if device == "cuda":
            import torch

            torch.cuda.synchronize()

    once()
    first = time.time() - _process_start()
    start = time.perf_counter()
    once()
    return {"first": first, "second": time.perf_counter() - start}


def _process_start() -> float:
    # seconds since the epoch: field 22 of /proc/self/stat counts ticks since boot
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime") as file:
        boot = time.time() - float(file.read().split()[0])
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def in_a_new_interpreter(*arguments: str) -> dict[str, float]:
    """The seconds of :func:`first_step` in a fresh interpreter, imports included."""
    command = [sys.executable, "-m", "benchmarks.bench_first_call", *arguments]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    told: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def results(settings: Settings) -> list[Result]:
    """Ours, then upstream."""
    from benchmarks import bench_training_step as bench

    name, case = next(iter(settings.pick(bench.CASES, gpu=bench.ON_GPU, tiny=bench.TINY).items()))
    asked = json.dumps(dataclasses.asdict(case))
    caches = ("empty Triton cache", "warm Triton cache") if settings.mode == "gpu" else ("",)
    kinds = (bench.OURS,) if settings.only_ours else (bench.OURS, bench.THEIRS)
    found = []
    for kind in kinds:
        role = "ours" if kind == bench.OURS else "peer"
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = cache
            for state in caches:
                times: dict[str, list[float]] = {"first": [], "second": []}
                # The cache is empty only once.
                for _ in range(1 if state.startswith("empty") else settings.pick(1, full=3, gpu=3)):
                    told = in_a_new_interpreter(kind, asked, settings.device)
                    for which, seconds in told.items():
                        times[which].append(seconds)
                tail = f", {state}" if state else ""
                for which, what in (("first", "start to first step"), ("second", "second step")):
                    case_name = f"{name}: {what}{tail}"
                    found.append(Result(JOB, case_name, kind, role, times[which]))
    return sorted(found, key=lambda r: r.case)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(2)
    print(json.dumps(first_step(*sys.argv[1:])))
