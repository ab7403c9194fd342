"""Compiles Triton's kernels ahead of time on a machine without a GPU, and counts cache hits on one.

    python -m benchmarks.harvest.triton_cache --target sm_90     # into build/triton-cache

Run it with the Python, the torch and the Triton of the machine that has the GPU: Triton looks for a
kernel by its source, its arguments, its own files and its version. The stages and the GPU tests
first run in Triton's interpreter. Every launch is recorded and skipped, so their results are
meaningless. The recorded launches are then compiled as Triton's launcher would, and so are the C
launchers: the machine with the GPU needs no compiler. It compiles whatever is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness import ROOT
from benchmarks.harvest.measuring import Run, Stage
from musiclm_fast.ops import _triton_target

CACHE = ROOT / "build" / "triton-cache"
NOTED = "MUSICLM_FAST_NOTED_LAUNCHES"  # the folder that a recording process writes into


@contextlib.contextmanager
def report_compilations(stage: Stage) -> Iterator[None]:
    """A row with the number of kernels from the cache and the time to compile the others."""
    if not stage.gpu:
        yield
        return
    from triton import knobs

    hits, compiled = 0, []

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        nonlocal hits
        hits += cache_hit
        if not cache_hit:
            compiled.append(times.total / 1e6)

    knobs.compilation.listener = listen
    yield
    if hits or compiled:
        stage.note("Triton kernels", f"{hits} from the cache, {len(compiled)} compiled in "
                   f"{sum(compiled):.1f} s")  # fmt: skip


# ---- recording: in a process with TRITON_INTERPRET=1


class Notes:
    """The distinct launches of a process, written when it ends."""

    def __init__(self) -> None:
        self.seen: dict[bytes, None] = {}

    def launch(
        self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, int]
    ) -> None:
        """Replaces :func:`musiclm_fast.ops._triton_target.launch`."""
        function = getattr(kernel, "fn", kernel)
        given = {
            name: (value.dtype, value.data_ptr() % 16) if hasattr(value, "data_ptr") else value
            for name, value in arguments.items()
        }
        noted = (function.__module__, function.__name__, given, options)
        self.seen.setdefault(pickle.dumps(noted))
        for value in arguments.values():  # some code refuses non-finite values
            if hasattr(value, "data_ptr") and value.is_floating_point():
                value.data.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)

    def write(self) -> None:
        path = Path(os.environ[NOTED]) / f"{os.getpid()}.pickle"
        path.write_bytes(pickle.dumps(list(self.seen)))


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Record and skip the launches of a block, 16-bit ones too."""
    notes = Notes()
    with (
        mock.patch.object(_triton_target, "launch", notes.launch),
        mock.patch.object(_triton_target, "refusal", return_value=""),
    ):
        yield
    notes.write()


class Noting(Stage):
    """A stage that runs each of our contenders once, at full size on a CPU."""

    def __init__(self, output: Path, name: str) -> None:
        super().__init__(output, name, tiny=False)
        self.only_ours = True

    def time(self, case: Any, contender: str, run: Run, **_: Any) -> Any:
        run()


def note_stages(output: Path) -> None:
    """The launches of the stages that time or check kernels."""
    from benchmarks.harvest import checks, kernels

    with noted():
        for function in (kernels.attention, kernels.contrastive, kernels.one_launch, checks.bits):
            function(Noting(output, "noting"))
        note_step()


def note_step() -> None:
    """The launches of training steps in each precision; a few pairs are enough."""
    import dataclasses

    from benchmarks import bench_training_step
    from benchmarks.harvest import cases
    from musiclm_fast.ops import use_backend

    for case in cases.steps(False, "step"):
        sizes = dataclasses.replace(case.shape["sizes"], batch=2)
        with use_backend(attention="triton", contrastive="triton"):
            model = bench_training_step.build(bench_training_step.OURS, sizes)
            batch = bench_training_step.inputs(sizes)
            bench_training_step.gradients(model, batch, case.shape["mode"])()


def pytest_configure(config: Any) -> None:
    """A pytest plugin: records the launches of tests."""
    context = noted()
    context.__enter__()
    config.add_cleanup(lambda: context.__exit__(None, None, None))


# ---- compiling


class Pointer:
    """A tensor as Triton's launcher sees it: a dtype and an address."""

    def __init__(self, dtype: Any, address: int) -> None:
        self.dtype, self.address = dtype, address

    def data_ptr(self) -> int:
        return self.address


def compile_noted(launches: Sequence[bytes], target: str) -> tuple[set[str], int]:
    """Compile the recorded launches into TRITON_CACHE_DIR, machine code only.

    Returns:
        The kernels by Triton's hash, existing ones too; the number of failed launches.
    """
    from triton import knobs
    from triton.runtime import driver

    made: set[str] = set()
    failed = 0

    def listen(*, metadata: Any, **_: Any) -> None:
        made.add(metadata["hash"] if isinstance(metadata, dict) else metadata.hash)

    knobs.compilation.listener = listen
    knobs.compilation.store_binary_only = True
    driver.set_active(_driver(target))
    with _unloaded_launchers() as launcher:
        for noted_launch in launches:
            module, name, arguments, options = pickle.loads(noted_launch)
            kernel = getattr(importlib.import_module(module), name)
            arguments = {
                key: Pointer(*value) if isinstance(value, tuple) else value
                for key, value in arguments.items()
            }
            try:
                compiled = kernel.warmup(grid=(1,), **arguments, **options, enable_fp_fusion=True)
                launcher(compiled)
            except Exception as error:
                failed += 1
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return made, failed


def compile_in_parallel(launches: Sequence[bytes], target: str) -> tuple[set[str], int]:
    """:func:`compile_noted` on every processor."""
    count = os.cpu_count() or 1
    parts = [launches[start::count] for start in range(count)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        results = list(pool.map(compile_noted, parts, [target] * count))
    return set().union(*(made for made, _ in results)), sum(failed for _, failed in results)


def _driver(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    driver.get_current_device.return_value = 0
    driver.get_current_stream.return_value = 0
    return driver


@contextlib.contextmanager
def _unloaded_launchers() -> Iterator[Any]:
    """Builds a kernel's C launcher without loading it: there is no driver library here."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty.c")
        empty.write_text("")
        subprocess.run(
            ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1", empty],
            check=True,
        )
        with (
            mock.patch.object(nvidia, "libcuda_dirs", return_value=[folder]),
            mock.patch.object(build, "_load_module_from_path"),
        ):
            nvidia.CudaUtils()
            yield lambda compiled: nvidia.CudaLauncher(compiled.src, compiled.metadata)


def main(argv: Sequence[str] | None = None) -> int:
    """Record, compile, and report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harvest.triton_cache", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--target", default="sm_90", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=CACHE)
    parser.add_argument("--note-stages", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.note_stages:
        note_stages(args.note_stages)
        return 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "TRITON_INTERPRET": "1", NOTED: folder, "PYTHONPATH": str(ROOT)}
        stages = ["-m", "benchmarks.harvest.triton_cache", "--note-stages", folder]
        tests = ["-m", "pytest", "-q", "-p", "benchmarks.harvest.triton_cache", "--tb=no",
                 "-m", "gpu", "tests/ops"]  # fmt: skip
        for what, command in (("stages", stages), ("tests", tests)):
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True
            )
            if what == "stages" and done.returncode:
                sys.exit(f"noting the {what} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        notes = sorted(Path(folder).glob("*.pickle"))
        launches = dict.fromkeys(x for path in notes for x in pickle.loads(path.read_bytes()))
    noting = time.perf_counter() - start
    os.environ["TRITON_CACHE_DIR"] = str(args.output.absolute())
    made, failed = compile_in_parallel(list(launches), args.target)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(
        f"{len(launches)} launches noted in {noting:.0f} s; {len(made)} kernels for {args.target}, "
        f"{size / 2**20:.0f} MiB with what was there, in {time.perf_counter() - start:.0f} s, in "
        f"{args.output}; {failed} failed"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
