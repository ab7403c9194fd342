"""Runs the benchmarks and writes their results: a table, JSON, ``results/<device>.md``, charts.

    python -m benchmarks.run                       # quick mode, on the CPU: eight minutes
    python -m benchmarks.run spectrogram           # one file; the others' results stay
    python -m benchmarks.run training_step --case "10 s"    # cases whose name holds a text
    python -m benchmarks.run --mode full           # every peer and mode
    python -m benchmarks.run --mode gpu            # on the CUDA device
    python -m benchmarks.run --base HEAD~3         # this tree against another commit, ours alone
    python -m benchmarks.run --tiny --output DIR   # smallest sizes: does every benchmark run?

Each file runs in its own process. If one fails, it is named at the end, the results of the others
are kept, and the exit status is 1. ``--resume`` skips files with results of this commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, tables
from benchmarks.harness import (
    MODES,
    PARITY_FAILED,
    ROOT,
    Result,
    Settings,
    environment,
    in_fresh_process,
)

RESULTS = ROOT / "benchmarks" / "results"
HERE = ROOT / "benchmarks"
THREADS = 2  # of torch on a CPU, for all quoted figures


def names() -> list[str]:
    """Every benchmark of the suite: ``bench_<name>.py`` with ``results``, or a pytest-benchmark
    suite that fills ``extra_info``. Others write their own reports."""
    offered = ("def results(", "benchmark.extra_info")
    return sorted(
        path.stem.removeprefix("bench_")
        for path in HERE.glob("bench_*.py")
        if any(text in path.read_text() for text in offered)
    )


def default_names(mode: str) -> list[str]:
    """The files to run without a name: in quick mode not those with ``QUICK = False``, which take
    too long; files for a GPU only in its mode."""
    found = []
    for name in names():
        for_a_gpu = name.endswith("_gpu")
        slow = "\nQUICK = False" in (HERE / f"bench_{name}.py").read_text()
        if (not for_a_gpu or mode == "gpu") and not (slow and mode == "quick"):
            found.append(name)
    return found


def run_here(name: str, settings: Settings) -> list[Result]:
    """Results of one benchmark, in this process: of its ``results``, or of the file as a
    pytest-benchmark suite."""
    import torch

    torch.set_num_threads(THREADS)
    module = importlib.import_module(f"benchmarks.bench_{name}")
    if hasattr(module, "results"):
        found: list[Result] = module.results(settings)
        return found
    return run_suite(HERE / f"bench_{name}.py", settings)


def run_suite(path: Path, settings: Settings) -> list[Result]:
    """Results of a pytest-benchmark suite, whose tests fill ``benchmark.extra_info`` with the
    fields of a :class:`Result`: job, case, contender, role and others.

    Raises:
        RuntimeError: a test failed.
    """
    if settings.mode == "gpu":
        return []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "suite.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(path)]
        command += [f"--benchmark-json={out}", "--benchmark-disable-gc"]
        if settings.tiny:
            command.append("--benchmark-min-rounds=1")
        # pytest-benchmark measures nothing in a worker of pytest-xdist.
        environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:])
        entries = json.loads(out.read_text())["benchmarks"]
    found = [Result(seconds=e["stats"]["data"], **e["extra_info"]) for e in entries]
    return [r for r in found if r.ours or not settings.only_ours]


def run_apart(name: str, settings: Settings, root: Path = ROOT) -> dict[str, Any]:
    """One benchmark's section of the results, from a fresh process.

    Args:
        root: the folder whose ``benchmarks`` and ``musiclm_fast`` run.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    if settings.mode != "gpu" and root == ROOT:
        try:
            found: dict[str, Any] = in_fresh_process(section_of, name, settings)
        except Exception as error:
            raise RuntimeError(f"{name}: {''.join(traceback.format_exception(error))}") from None
        return found
    # A GPU's driver does not survive a fork, and another tree needs its own imports.
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "section.json"
        asked = json.dumps(dataclasses.asdict(settings))
        command = [sys.executable, "-m", "benchmarks.run", "--worker", name, asked, str(out)]
        environ = {**os.environ, "PYTHONPATH": str(root)}
        if settings.mode == "gpu" and settings.device == "cpu":
            environ["TRITON_INTERPRET"] = "1"  # the GPU's kernels, interpreted
        done = subprocess.run(
            command,
            cwd=root,
            env=environ,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{name}: {done.stderr[-3000:].strip() or 'no results'}")
        section: dict[str, Any] = json.loads(out.read_text())
    return section


def section_of(name: str, settings: Settings) -> dict[str, Any]:
    """The work of one benchmark's process: its results and the facts about them."""
    results = run_here(name, settings)
    facts = environment()
    facts["command"] = f"python -m benchmarks.run {name} --mode {settings.mode}"
    return {"facts": facts, "results": [dataclasses.asdict(r) for r in results]}


def run_all(wanted: Sequence[str], settings: Settings, output: Path, resume: bool) -> int:
    """Run benchmarks one after the other and write everything after each; the exit status."""
    failed = []
    for name in wanted:
        facts = environment()
        store = output / f"{report.slug(facts['device'], settings.mode)}.json"
        sections = json.loads(store.read_text()) if store.exists() else {}
        if resume and name in sections and sections[name]["facts"]["commit"] == facts["commit"]:
            print(f"== {name}: already measured at {facts['commit']}", flush=True)
            continue
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            section = run_apart(name, settings)
        except RuntimeError as error:
            failed.append(name)
            print(error, file=sys.stderr, flush=True)
            continue
        section["wall_seconds"] = round(time.perf_counter() - start, 1)
        if not section["results"]:
            print(f"nothing to measure in mode {settings.mode}", flush=True)
            continue
        results = report.read(section)
        print(report.table(results), flush=True)
        broken = [r for r in results if r.reason.startswith(PARITY_FAILED)]
        if broken:
            failed.append(name)
        if settings.case and name in sections:
            section = merged(sections[name], section)
        sections[name] = section
        report.write(sections, store, name)
    if output == RESULTS:
        print("README's table follows by `python -m benchmarks.readme_table`", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A section with some cases replaced; only the new ones if the others are of another commit."""
    if before["facts"]["commit"] != now["facts"]["commit"]:
        return now
    anew = {(r["job"], r["case"]) for r in now["results"]}
    kept = [r for r in before["results"] if (r["job"], r["case"]) not in anew]
    seconds = before["wall_seconds"] + now["wall_seconds"]
    return {**now, "results": kept + now["results"], "wall_seconds": seconds}


def base_tree(revision: str, folder: Path) -> Path:
    """A folder with this tree's benchmarks and the built package of another commit.

    Raises:
        RuntimeError: there is no such commit, or its library does not build.
    """

    def call(*command: str, cwd: Path = ROOT) -> None:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:].strip()}")

    source = folder / "source"
    call("git", "worktree", "add", "--detach", "--force", str(source), revision)
    same = subprocess.run(
        ["git", "diff", "--quiet", revision, "--", "csrc", "CMakeLists.txt", "setup.py"], cwd=ROOT
    )
    if same.returncode == 0:  # the same library
        for built in (ROOT / "musiclm_fast").glob("*.so"):
            shutil.copy2(built, source / "musiclm_fast")
    else:
        call(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=source)
    tree = folder / "tree"
    tree.mkdir()
    for name, origin in (("benchmarks", ROOT), ("tests", ROOT), ("musiclm_fast", source)):
        (tree / name).symlink_to(origin / name)
    return tree


def compare_with(revision: str, wanted: Sequence[str], settings: Settings, rounds: int) -> int:
    """Time ours at another commit and here, interleaved, in fresh processes; print the ratios.

    Both run this tree's benchmarks: that commit's package must have the functions that they call.
    """
    settings = dataclasses.replace(settings, only_ours=True)
    seconds: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            trees = (base_tree(revision, Path(folder)), ROOT)
            for _ in range(rounds):
                for name in wanted:
                    for which, tree in enumerate(trees):
                        for r in report.read(run_apart(name, settings, tree)):
                            if r.seconds:
                                key = (r.job, r.case, r.contender)
                                both = seconds.setdefault(key, ([], []))
                                both[which].append(r.timing.median)
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(Path(folder) / "source")],
                cwd=ROOT, capture_output=True,
            )  # fmt: skip
    lines = []
    for (job, case, contender), (before, now) in seconds.items():
        if before and now:
            ratios = [a / b for a, b in zip(before, now, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            times = [f"{statistics.median(s):.4g}" for s in (before, now)]
            lines.append([job, case, contender, *times, spread])
    heads = ["job", "case", "contender", f"{revision} s", "here s", f"{revision} / here"]
    print(tables.markdown(heads, lines))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}")
    parser.add_argument("--mode", choices=MODES, default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the mode's")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, to test the suite")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases that hold this")
    parser.add_argument("--base", metavar="REV", help="compare with this commit")
    parser.add_argument("--rounds", type=int, default=3, help="of --base (default 3)")
    parser.add_argument("--resume", action="store_true", help="skip files that this commit has")
    parser.add_argument(
        "--output", type=Path, help="folder of the results (default: benchmarks/results; none is "
        "kept with --tiny)",
    )  # fmt: skip
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        name, asked, out = args.worker
        Path(out).write_text(json.dumps(section_of(name, Settings(**json.loads(asked)))))
        return 0
    unknown = sorted(set(args.names) - set(names()))
    if unknown:
        parser.error(f"NAME: got {', '.join(unknown)}, expected some of {', '.join(names())}")
    device = args.device or ("cuda" if args.mode == "gpu" else "cpu")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device: got cuda, expected cpu: torch finds no CUDA device here")
    settings = Settings(args.mode, device, args.tiny, case=args.case)
    wanted = args.names or default_names(args.mode)
    if args.base:
        return compare_with(args.base, wanted, settings, args.rounds)
    if args.tiny and args.output is None:
        with tempfile.TemporaryDirectory() as folder:
            return run_all(wanted, settings, Path(folder), args.resume)
    return run_all(wanted, settings, args.output or RESULTS, args.resume)


if __name__ == "__main__":
    sys.exit(main())
