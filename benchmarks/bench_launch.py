"""CPU time of the Triton backends' calls, with the launch on the GPU stubbed out.

Each function of a backend that a usual call enters (tests/ops/triton_resources.py, ``USUAL``: a
forward, a backward) runs on small CPU tensors, where torch's operators take microseconds, as their
launches do, in two ways:

package             this package's Python: launches are recorded
package and Triton  with the launches of compiled kernels, on a driver whose launch does nothing

Each row is a repeated call: the first of a layout takes several times as long, beside compilation.

What neither has: the custom operator and its autograd around the function, a GPU's allocator, the
driver's launch. The note has the number of launches at full sizes, counted on meta tensors. Runs
without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import Result, Settings
from benchmarks.predict.launches import TARGET
from musiclm_fast._wording import plural
from musiclm_fast.ops import _triton_target

JOB = "Triton calls, CPU time without the launch"
# Full sizes beside the usual one, and those that are timed; an op without has its usual size.
SIZES = {"attention": [dict(batch=b, queries=n, keys=n) for b, n in ((64, 744), (16, 2048))]}
SMALL = {
    "attention": dict(batch=2, queries=64, keys=64, radius=63), "contrastive": dict(batch=128),
    "geglu_norm": dict(rows=64), "hyper_connection": dict(tokens=64),
}  # fmt: skip
ROUNDS = 30
Calls = list[tuple[str, float, int]]  # function, seconds, launches


@contextlib.contextmanager
def entered(module: ModuleType, launches: Callable[[], int]) -> Iterator[Calls]:
    """The calls of a module's public functions from outside of it, in order."""
    found: Calls = []
    depth = 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            before, start = launches(), time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                depth -= 1
                if depth == 0:
                    found.append((function.__name__, seconds, launches() - before))

        return run

    with contextlib.ExitStack() as stack:
        for name, function in vars(module).copy().items():
            if not inspect.isfunction(function) or name.startswith("_"):
                continue
            if function.__module__.startswith(f"{module.__package__}."):
                stack.enter_context(mock.patch.object(module, name, timed(function)))
        yield found


class StubDriver:
    """A driver of a GPU of ``TARGET`` whose kernels do nothing; it counts the launches."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches = 0
        self.target = GPUTarget("cuda", int(TARGET.removeprefix("sm_")), 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any) -> None:
        self.launches += 1


@contextlib.contextmanager
def launching_nothing() -> Iterator[StubDriver]:
    """Triton on a :class:`StubDriver`."""
    from triton.runtime import driver

    stub = StubDriver()
    with mock.patch.object(driver, "_active", stub):
        yield stub


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Tensors that are asked for on the meta device are on the CPU."""
    empty = torch.empty

    def made(*sizes: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return empty(*sizes, device="cpu" if device == "meta" else device, **options)

    with mock.patch("torch.empty", made):
        yield


def counted(op: str, variant: Any) -> Calls:
    """The functions that a call enters with the number of their launches, on meta tensors."""
    recorded: list[Any] = []
    with (
        _triton_target.recorded_launches(lambda *_: recorded.append(0), TARGET),
        entered(backend(op), lambda: len(recorded)) as calls,
    ):
        variant.call()
    return calls


def backend(op: str) -> ModuleType:
    return importlib.import_module(f"musiclm_fast.ops.{op}._triton")


def measure(op: str, usual: Any, rounds: int) -> list[Result]:
    """Both ways of each function that a call enters."""
    small = replace(usual, **SMALL.get(op, {}))
    full = [usual, *(replace(usual, **sizes) for sizes in SIZES.get(op, []))]
    at_full = [(variant, counted(op, variant)) for variant in full]
    recorded: list[Any] = []

    def recording() -> contextlib.AbstractContextManager[None]:
        return _triton_target.recorded_launches(lambda *_: recorded.append(0), TARGET)

    seen: dict[str, list[Calls]] = {"package": [], "package and Triton": []}
    with launching_nothing() as stub, on_cpu():
        ways = [(recording, lambda: len(recorded)), (contextlib.nullcontext, lambda: stub.launches)]
        for round_ in range(rounds + 2):  # the first two compile and warm up
            for rows, (way, launches) in zip(seen.values(), ways, strict=True):
                with way(), entered(backend(op), launches) as calls:
                    small.call()
                if round_ >= 2:
                    rows.append(calls)
    found = []
    for n, (name, _, count) in enumerate(seen["package"][0]):
        case = f"{small}: {name}, {plural(count, 'launch', 'launches')}"
        note = "launches: " + "; ".join(f"{c[n][2]} at {variant}" for variant, c in at_full)
        for who, rows in seen.items():
            if rows[0][n][2] != count:
                raise AssertionError(f"{case}: {who} has {rows[0][n][2]}")
            seconds = [calls[n][1] for calls in rows]
            found.append(Result(JOB, case, who, "ours", seconds, note=note))
    return found


def results(settings: Settings) -> list[Result]:
    """Every function of every usual call; none where kernels run in the interpreter."""
    if _triton_target.INTERPRET:
        return []
    if not _triton_target.available()[0]:
        return [Result(JOB, "every op", "ours", "ours", reason="triton is not installed")]
    from tests.ops import triton_resources

    rounds = settings.pick(ROUNDS, tiny=2)
    return [r for op, usual in triton_resources.USUAL.items() for r in measure(op, usual, rounds)]


def main() -> None:
    """Print the median of each."""
    torch.set_num_threads(1)
    for r in results(Settings()):
        print(f"{1e6 * statistics.median(r.seconds):8.0f} us  {r.contender:20}{r.case}; {r.note}")


if __name__ == "__main__":
    main()
