"""Rows of a stage, and the clocks: CUDA events, CUPTI, a replayed graph.

On a CPU each has a stand-in, so that a dry run runs the same lines: the host's clock for events, a
plain call for a replay, and no kernels. Their rows say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import peak_memory, timed
from benchmarks.harvest.cases import Case
from musiclm_fast._dispatch import BackendError
from musiclm_fast._files import atomic_file

Run = Callable[[], Any]
LOST = 77  # exit status if every call to CUDA fails, as after an illegal access
STAND_IN = "dry run: host clock, plain call for a replay, no kernel seen"


@dataclasses.dataclass
class Row:
    """One figure of a stage.

    Args:
        case: its name; contender: who ran it.
        ms: median of one call between CUDA events, including gaps if the CPU launches too
            slowly; least, most: of all calls.
        kernels_ms: sum of the kernels' own times of one call, by CUPTI; launches: their number.
        graph_ms: of one call replayed from a CUDA graph, without the cost of launching.
        tflops, gbs: operations and bytes that the case needs, over ``kernels_ms``, else ``ms``.
        memory: peak bytes of a call beyond the memory held before.
        failed: why there is no time, or the error.
        note: any other finding.
    """

    case: str
    contender: str = ""
    ms: float | None = None
    least: float | None = None
    most: float | None = None
    kernels_ms: float | None = None
    launches: int | None = None
    graph_ms: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    memory: int | None = None
    failed: str = ""
    note: str = ""


class Stage:
    """The rows of a stage; the file is complete after each.

    Args:
        output: folder of the results.
        name: the stage's.
        tiny: smallest sizes, and few repetitions.
        resume: continue after the existing rows.
    """

    def __init__(self, output: Path, name: str, tiny: bool, resume: bool = False) -> None:
        self.output, self.name, self.tiny = output, name, tiny
        self.gpu = torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        self.only_ours = self.profiled = False
        self.rows: list[Row] = []
        if resume:
            self.rows = [Row(**row) for row in json.loads(self._path.read_text())]
        self._before = {(row.case, row.contender) for row in self.rows}
        self._flush()

    def contenders(self, case: Case) -> list[str]:
        """The contenders of a case."""
        return [
            name for name in case.contenders
            if (name.startswith("ours") or not self.only_ours) and not self.done(case.name, name)
        ]  # fmt: skip

    def done(self, case: str, contender: str) -> bool:
        """Whether the previous process has written its row."""
        return (case, contender) in self._before

    @property
    def _path(self) -> Path:
        return self.output / f"stage-{self.name}.json"

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        found = {k: v for k, v in vars(row).items() if v not in (None, "")}
        short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
        print("  ".join(f"{k}={v}" for k, v in short.items()), flush=True)
        self._flush()
        return row

    def note(self, case: str, text: str, contender: str = "") -> None:
        """Add a finding other than a time."""
        self.add(Row(case, contender, note=text))

    def fail(self, case: str, text: str, contender: str = "") -> None:
        """Add an error: the stage counts as failed, and continues."""
        self.add(Row(case, contender, failed=text))

    def _flush(self) -> None:
        write(self._path, json.dumps([vars(r) for r in self.rows]))

    @contextlib.contextmanager
    def attempt(self, case: str, contender: str, optional: bool = False) -> Iterator[None]:
        """A contender that raises gets a row with the reason: a failure, or a finding if it is
        ``optional`` (a peer; what does not run everywhere) or if a kernel refuses the call. If CUDA
        is lost too, the process ends, and a fresh one continues."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            known = optional or isinstance(error, BackendError)
            (self.note if known else self.fail)(case, text, contender)
            self._end_if_lost()

    def time(
        self, case: Case, contender: str, run: Run, *, memory: bool = False, graph: bool = True,
        note: str = "",
    ) -> Row:  # fmt: skip
        """Measure ``run`` and add its row.

        Args:
            case: whose operations and bytes count, and how long its calls are repeated.
            contender: who runs it.
            run: one call, on the current stream.
            memory: measure the peak too.
            graph: replay it from a CUDA graph too.
            note: goes into the row.
        """
        if self.gpu and not self.profiled:
            # CUPTI stays loaded and may slow launches: load it for all alike.
            self.profiled = True
            with _optional(Row(case.name), "CUPTI"):
                kernel_table(lambda: None, calls=1)
        milliseconds = call_times(run, case.budget, self.gpu)
        row = Row(case.name, contender, statistics.median(milliseconds), min(milliseconds),
                  max(milliseconds), note=note)  # fmt: skip
        with _optional(row, "kernels"):
            table = kernel_table(run) if self.gpu else []
            if table:
                row.kernels_ms = sum(ms for _, ms, _ in table)
                row.launches = round(sum(n for _, _, n in table))
        if memory and self.gpu:
            with _optional(row, "memory"):
                row.memory = peak_memory(run)
        if graph:
            with _optional(row, "graph"):
                row.graph_ms = replay_time(run, self.gpu)
        seconds = (row.kernels_ms or row.ms or 0.0) / 1e3
        row.tflops = case.operations / seconds / 1e12 if case.operations else None
        row.gbs = case.traffic / seconds / 1e9 if case.traffic else None
        if not self.gpu:
            row.note = f"{row.note} {STAND_IN}".strip()
        self.add(row)
        self._end_if_lost()
        return row

    def _end_if_lost(self) -> None:
        if self.gpu and _lost():
            os._exit(LOST)  # a normal exit would call CUDA again


def _lost() -> bool:
    """Whether every call to CUDA fails from now on."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@contextlib.contextmanager
def _optional(row: Row, what: str) -> Iterator[None]:
    """A clock that fails is a note in the row; the other clocks' figures are kept."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        row.note = f"{row.note} no {what}: {' '.join(str(error).split())[:100]}".strip()


def worker(name: str, output: Path, tiny: bool) -> list[str]:
    """The command of a process that runs a stage, or a part of it."""
    return [
        sys.executable, "-m", "benchmarks.harvest", "--worker", name, "--output", str(output),
        *(["--tiny"] if tiny else []),
    ]  # fmt: skip


def tool_for(stage: Stage, name: str, watched: Callable[[Stage], None]) -> str | None:
    """Path of a tool that runs a worker. Without a GPU the worker's body runs here, without the
    tool. A row says so, or that the tool is missing."""
    if not stage.gpu:
        stage.note(name, "dry run: what it would watch runs without it")
        watched(stage)
        return None
    tool = shutil.which(name)
    if tool is None:
        stage.note(name, "left out: it is not on PATH")
    return tool


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def call_times(run: Run, budget: float, gpu: bool) -> list[float]:
    """Milliseconds of single calls: three to warm up, then as many as fit in ``budget`` seconds,
    5 to 200."""
    if not gpu:
        return [1e3 * timed(run)]
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(5, min(200, int(budget / max(time.perf_counter() - start, 1e-6))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def kernel_table(run: Run, calls: int = 3, trace: Path | None = None) -> list[
    tuple[str, float, float]
]:  # fmt: skip
    """Name, milliseconds and launches a call of every kernel, longest first; on a GPU.

    Args:
        run: one call.
        calls: how many are profiled.
        trace: path of a Chrome trace to write, with the CPU's side.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA, *([ProfilerActivity.CPU] if trace else [])]
    torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(str(trace))
    found: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        # Named spans, such as the optimizer's step, are on the device's side too.
        if "cuda" in str(event.device_type).lower() and not event.is_user_annotation:
            entry = found.setdefault(event.name, [0.0, 0.0])
            entry[0] += event.device_time / 1e3 / calls
            entry[1] += 1 / calls
    return sorted(((n, ms, c) for n, (ms, c) in found.items()), key=lambda f: -f[1])


def replay_time(run: Run, gpu: bool, replays: int = 20) -> float:
    """Milliseconds of one call from a captured graph, back to back with others.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    if not gpu:
        return 1e3 * timed(run)
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        run()
    graph.replay()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(replays):
        graph.replay()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / replays


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture the current stream's work into ``graph``.

    After a capture that fails, torch refuses random numbers ("offset increment outside graph
    capture") and the allocator does not free its cache when memory is short. This repairs both.
    """
    device = torch.cuda.current_device()
    generator = torch.cuda.default_generators[device]
    before = generator.clone_state()
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            yield
    except Exception as error:
        generator.graphsafe_set_state(before)
        with contextlib.suppress(RuntimeError):  # the capture itself ended normally
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        # Two errors: the refused call, and the end of the capture. The first is the cause.
        raise RuntimeError(str(error.__context__ or error)) from error


@contextlib.contextmanager
def own_stream(gpu: bool) -> Iterator[None]:
    """A side stream: autograd runs the backward on the stream of the forward, and the default
    stream cannot be captured. Its cached memory is freed afterwards: no other stream could use
    it."""
    if not gpu:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        with contextlib.suppress(RuntimeError):  # CUDA itself may have failed
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
