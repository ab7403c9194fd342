"""What every benchmark shares: interleaved timing, peak memory of a fresh process, environment.

A benchmark is a file ``bench_<name>.py`` with ``results(settings) -> list[Result]``; ``python -m
benchmarks.run`` runs one or all and writes tables, JSON and charts. Most of ``results`` is a call
of :func:`measure` per case, which checks parity first, lists a contender that cannot run with its
reason, and times the others in turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from musiclm_fast import testing

# Not resolved: `--base` runs this folder beside another commit's package, by a link.
ROOT = Path(__file__).absolute().parent.parent
MIB = 1024 * 1024
MODES = ("quick", "full", "gpu")
PARITY_FAILED = "parity check failed"


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
            seconds = timed(run)
            if round_ >= warmup:
                times[name].append(seconds)
    return {name: Timing(seconds) for name, seconds in times.items()}


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Median, least and greatest of the ratio round by round; of one that ran once to each round
    of the other."""
    a, b = slow.seconds, fast.seconds
    if len(a) != len(b) and min(len(a), len(b)) == 1:
        a, b = a * max(1, len(b) // len(a)), b * max(1, len(a) // len(b))
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


@dataclass(frozen=True)
class Settings:
    """What a benchmark is asked for.

    Args:
        mode: ``"quick"`` (float32, eager, slow reference jobs once), ``"full"`` (every peer and
            mode) or ``"gpu"``.
        device: ``"cpu"`` or ``"cuda"``.
        tiny: the smallest sizes that still run every line, to test a benchmark and not the code.
        only_ours: leave the peers out, as a comparison of two commits does.
        case: measure only cases whose name holds this text.
    """

    mode: str = "quick"
    device: str = "cpu"
    tiny: bool = False
    only_ours: bool = False
    case: str = ""

    def pick(self, quick: Any, full: Any = None, gpu: Any = None, tiny: Any = None) -> Any:
        """The value for this mode; ``full`` and ``gpu`` are ``quick``'s unless given."""
        if self.tiny and tiny is not None:
            return tiny
        chosen = {"quick": quick, "full": full, "gpu": gpu}[self.mode]
        return quick if chosen is None else chosen


@dataclass(frozen=True)
class Contender:
    """Something to be timed.

    Args:
        build: makes what is run; raises where it cannot, and the reason is listed.
        memory: peak memory of one run in bytes, measured apart; None where it is not measured.
        operations: floating-point operations of one run; traffic: bytes that it must move.
        once: too slow to repeat; runs in the first round alone, without a warm-up.
        apart: for what is slow and large: seconds and peak memory in bytes of one run in a process
            of its own, which takes the place of ``build`` and ``memory``.
        role: ``"ours"``, ``"peer"``, or ``"bound"``: a part of the work that nobody can do without.
    """

    build: Callable[[], Callable[[], Any]]
    memory: Callable[[], int] | None = None
    operations: float | None = None
    traffic: float | None = None
    once: bool = False
    apart: Callable[[], tuple[float, int]] | None = None
    role: str = "peer"


@dataclass(frozen=True)
class Result:
    """One contender of one case, as it is stored.

    Args:
        job: the op or whole job.
        case: its shape, in words.
        contender: who ran it, and in which mode.
        role: as in :class:`Contender`.
        seconds: of each interleaved round; empty where it did not run.
        operations, traffic: floating-point operations and bytes of one run, where they are counted.
        memory: peak memory in bytes beyond what is held before, where it was measured.
        reason: why it did not run.
        note: what was found, where that is not a time.
        axes: numbers that a chart may be drawn over, such as seconds of audio or pairs of a batch.
        headline: of ours: what README's table of results calls this case; "" leaves it out there.
    """

    job: str
    case: str
    contender: str
    role: str = "peer"
    seconds: list[float] = field(default_factory=list)
    operations: float | None = None
    traffic: float | None = None
    memory: int | None = None
    reason: str = ""
    note: str = ""
    axes: dict[str, float] = field(default_factory=dict)
    headline: str = ""

    @property
    def ours(self) -> bool:
        return self.role == "ours"

    @property
    def timing(self) -> Timing:
        return Timing(self.seconds)

    @property
    def tflops(self) -> float | None:
        """Operations per second, in 10**12."""
        if self.operations is None or not self.seconds:
            return None
        return self.operations / self.timing.median / 1e12

    @property
    def gigabytes_per_second(self) -> float | None:
        """Counted traffic per second, in 10**9 bytes."""
        if self.traffic is None or not self.seconds:
            return None
        return self.traffic / self.timing.median / 1e9


def measure(
    job: str,
    case: str,
    contenders: Mapping[str, Contender],
    settings: Settings,
    *,
    check: Callable[[], Any],
    rounds: int = 3,
    warmup: int = 1,
    axes: Mapping[str, float] | None = None,
    headline: str = "",
) -> list[Result]:
    """Check parity, then time the contenders in turn.

    Where ``check`` raises AssertionError no speed is reported: ours is listed with its message, the
    others with "not timed". A contender that cannot be built or fails in its first run is listed
    with the reason; ours raises, unless memory is short.

    Args:
        headline: names the case in README's table, where the first of ours meets the first peer.
    """
    if settings.case not in case:
        return []
    if settings.tiny:
        rounds, warmup = 1, 0
    if settings.only_ours:
        contenders = {name: c for name, c in contenders.items() if c.role == "ours"}
    places = dict(axes or {})
    shown = next((name for name, c in contenders.items() if c.role == "ours"), "")

    def result(name: str, **found: Any) -> Result:
        c = contenders[name]
        return Result(
            job, case, name, c.role, operations=c.operations, traffic=c.traffic, axes=places,
            headline=headline if name == shown else "", **found,
        )  # fmt: skip

    try:
        check()
    except AssertionError as error:
        first = (str(error).strip() or "values disagree").splitlines()[0]
        failed = {True: f"{PARITY_FAILED}: {first}", False: f"not timed: {PARITY_FAILED}"}
        return [result(name, reason=failed[c.role == "ours"]) for name, c in contenders.items()]
    runs: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        # what work returns; a peer that raises is out, with the reason
        try:
            return work()
        except Exception as error:
            # A smaller device than a case is made for is no error of ours.
            if contenders[name].role == "ours" and not isinstance(error, torch.OutOfMemoryError):
                raise
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            runs.pop(name, None)

    alone: dict[str, tuple[float, int]] = {}
    for name, c in contenders.items():
        if c.apart is not None:
            measured = attempt(name, c.apart)
            if measured is not None:
                alone[name] = measured
            continue
        run = attempt(name, c.build)
        if run is not None:
            runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    with _imports_uncollected():
        for round_ in range(warmup + rounds):
            for name, run in list(runs.items()):
                if contenders[name].once and round_ != warmup:
                    continue
                seconds = attempt(name, functools.partial(timed, run))
                if round_ >= warmup and seconds is not None:
                    times[name].append(seconds)
    runs.clear()
    found = []
    for name, c in contenders.items():
        if name in absent:
            found.append(result(name, reason=absent[name]))
        elif name in alone:
            seconds, memory = alone[name]
            note = "in a process of its own"
            found.append(result(name, seconds=[seconds], memory=memory, note=note))
        else:
            measured = c.memory is not None and (c.role == "ours" or not settings.tiny)
            memory = attempt(name, c.memory) if measured else None
            note = f"memory: {absent[name]}" if name in absent else ""
            found.append(result(name, seconds=times[name], memory=memory, note=note))
    return found


def oracle(
    theirs: Callable[[], torch.nn.Module], ours: Callable[[], torch.nn.Module]
) -> tuple[torch.nn.Module, contextlib.AbstractContextManager[None]]:
    """The model that ours is held against, and the context to run it in: the live reference's, or
    where that is not installed (a machine with a GPU and no network may lack it) one of ours on the
    ops' torch definitions."""
    from musiclm_fast.ops import use_backend

    try:
        return theirs(), contextlib.nullcontext()
    except ImportError:
        return ours(), use_backend("torch")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch runs on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_against_copy(
    job: str,
    case: str,
    step: Callable[[dict[str, torch.Tensor], str], Callable[[], dict[str, torch.Tensor]]],
    inputs: dict[str, torch.Tensor],
    small: dict[str, torch.Tensor],
    values: int,
    settings: Settings,
    headline: str,
) -> list[Result]:
    """An op that memory bounds, on one thread: the C++ kernel, the torch path, and a copy of as
    much memory.

    Args:
        step: of the inputs and a backend; its run returns gradients by name.
        small: inputs whose gradients are first held against the definition in float64.
        values: float32 values that a step must read or write.
    """

    def check() -> None:
        wide = testing.to_float64(small)
        calls = ((small, "cpp"), (small, "torch"), (wide, "torch"))
        found = [step(given, backend)() for given, backend in calls]
        for name in found[0]:
            testing.assert_close_to_oracle(name, *(f[name] for f in found))

    source = torch.randn(values // 2)
    target = torch.empty_like(source)
    traffic = 4.0 * values
    contenders = {
        "ours": Contender(lambda: step(inputs, "cpp"), traffic=traffic, role="ours"),
        "torch, the definition": Contender(lambda: step(inputs, "torch"), traffic=traffic),
        "a copy of as much": Contender(
            lambda: lambda: target.copy_(source), traffic=traffic, role="bound"
        ),
    }
    with one_thread():
        return measure(job, case, contenders, settings, check=check, rounds=7, headline=headline)


@contextlib.contextmanager
def _imports_uncollected() -> Iterator[None]:
    # Else each collection before a run walks the reference's imports, a quarter of a second.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run, to the end of what it started on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def need_memory(needed: float) -> None:
    """For what would take the machine down.

    Raises:
        MemoryError: fewer bytes than ``needed`` are available.
    """
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if needed > free:
        raise MemoryError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are available")


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
    with contextlib.suppress(OSError, AttributeError):  # glibc: what was freed is resident no more
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = current()
    run()
    return max(0, high_water() - before)


def gpu_memory(
    build: Callable[[], Callable[[], Any]], between: Callable[[], Any] = lambda: None
) -> int:
    """Peak memory of the second ``build()()`` on the GPU over what is held before, in bytes: the
    first compiles and fills caches. ``between`` lets go of what the first left, such as gradients.
    """
    run = build()
    run()
    between()
    gc.collect()
    return peak_memory(run)


def peak_memory(run: Callable[[], Any]) -> int:
    """Peak memory of a call on the GPU over what is held before, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns, or raises, in a process where nothing has run yet.

    It is forked from a server that has imported what :mod:`benchmarks.preload` names and has no
    threads; a fork of this process would not do. torch gets as many threads there as here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    with ProcessPoolExecutor(1, context, _settle, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()


def _settle(threads: int) -> None:
    # The reference prints and warns in the midst of what is a table here.
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # not installed
        return ""
    return done.stdout.strip()


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
    commit = _git("rev-parse", "--short", "HEAD")
    # The results of earlier benchmarks of a run are no change of what is measured.
    if _git("diff", "HEAD", "--stat", "--", ".", ":(exclude)benchmarks/results"):
        commit += "-dirty"
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
