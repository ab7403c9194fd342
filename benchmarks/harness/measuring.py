"""A case: parity, then the time of every contender."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.harness.records import Contender, Result, Settings
from benchmarks.harness.timing import imports_uncollected, one_thread, timed
from musiclm_fast import testing

PARITY_FAILED = "parity check failed"


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
    """Check parity, then time the contenders, interleaved.

    If ``check`` raises AssertionError, no speed is reported: ours is listed with its message, the
    others with "not timed". A contender that cannot be built or fails in its first run is listed
    with the reason. Ours raises instead, except when out of memory.

    Args:
        headline: names the case in README's table: the first of ours against the first peer.
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
        # the result of work; a peer that raises is excluded, with the reason
        try:
            return work()
        except Exception as error:
            # A device with too little memory for a case is no error of ours.
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
    with imports_uncollected():
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
    """The model that ours is compared with, and its context: upstream's or, if that is not
    installed (as on a GPU machine without a network), one of ours on the ops' references."""
    from musiclm_fast.ops import use_backend

    try:
        return theirs(), contextlib.nullcontext()
    except ImportError:
        return ours(), use_backend("torch")


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
    """A memory-bound op on one thread: the C++ kernel, the torch path, and a copy of as much
    memory.

    Args:
        step: takes the inputs and a backend; its run returns gradients by name.
        small: inputs whose gradients are first compared with the float64 reference.
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
