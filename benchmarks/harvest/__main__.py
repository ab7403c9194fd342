"""Measures all there is to measure on a CUDA GPU in minutes: parity, speed, profile, in that order.

    python -m benchmarks.harvest                        # everything, under eight minutes
    python -m benchmarks.harvest --stages card,parity   # some stages
    python -m benchmarks.harvest --deadline 300         # stop starting stages after 300 s
    TRITON_INTERPRET=1 python -m benchmarks.harvest --tiny   # a dry run on a CPU

Needs torch, Triton, pytest and numpy, and no network. Every stage is a process with its own
deadline. It writes each result to disk at once. A stage that fails or is cut off is named with its
error, and the others continue. Optional packages and tools (upstream, peers, ncu,
compute-sanitizer) are used if installed and named if missing.

Writes into the output folder: harvest.json (all figures), harvest.md (tables), summary.txt (the
final table, with the predictions), profile-step.txt, trace-step.json.gz, ncu.csv, and a log per
stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import ROOT
from benchmarks.harvest import checks, kernels, models, summary
from benchmarks.harvest import survey as surveying
from benchmarks.harvest.measuring import LOST, Stage, worker, write
from benchmarks.harvest.triton_cache import CACHE, report_compilations

STAGES: dict[str, tuple[Callable[[Stage], None], float]] = {  # name -> function, deadline in s
    "card": (kernels.card, 40),
    "library": (checks.library, 120),
    "parity": (checks.parity, 150),
    "bits": (checks.bits, 60),
    "attention": (kernels.attention, 70),
    "contrastive": (kernels.contrastive, 70),
    "spectrogram": (kernels.spectrogram, 40),
    "step": (models.step, 80),
    "step_upstream": (models.step_upstream, 80),
    "generation": (models.generation, 60),
    "counters": (kernels.counters, 70),
    "flex": (kernels.flex, 60),
    "step_captured": (models.step_captured, 60),
    "step_compiled": (models.step_compiled, 120),
    "sanitizer": (checks.sanitizer, 90),
    "peers": (kernels.peers, 40),
}
WORKERS = {"one_launch": kernels.one_launch, "small_calls": checks.small_calls}


def run_stage(name: str, output: Path, tiny: bool, limit: float) -> dict[str, Any]:
    """A stage in its own process, ended at its deadline; its results so far."""
    log = output / f"stage-{name}.log"
    (output / f"stage-{name}.json").unlink(missing_ok=True)
    command = worker(name, output, tiny)
    start = time.perf_counter()
    with log.open("w") as stream:
        problem = run_worker(command, stream, log, limit)
        for _ in range(3):  # the rest of the rows, in fresh processes
            left = limit - (time.perf_counter() - start)
            if problem.startswith(f"exit {LOST}:") and left > 0:
                problem = run_worker([*command, "--resume"], stream, log, left)
    return {**rows_of(name, output), "problem": problem, "seconds": time.perf_counter() - start}


def run_worker(command: list[str], stream: IO[str], log: Path, limit: float) -> str:
    """Wait for a process, or end it at the deadline; what went wrong."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        if process.wait(limit):
            said = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            return f"exit {process.returncode}: {said[0] if said else ''}"[:400]
    except subprocess.TimeoutExpired:
        return f"cut off after {limit:.0f} s"
    finally:
        end(process)
    return ""


def end(process: subprocess.Popen[bytes]) -> None:
    """End a stage and its child processes; it has ten seconds to write its results."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may block it for ever
                process.wait(10)
    with contextlib.suppress(ProcessLookupError):  # child processes that are left
        os.killpg(process.pid, signal.SIGKILL)


def rows_of(name: str, output: Path) -> dict[str, Any]:
    """The rows that a stage has written so far."""
    path = output / f"stage-{name}.json"
    return {"rows": json.loads(path.read_text()) if path.exists() else []}


def survey(output: Path) -> surveying.Survey:
    """Survey the machine, in a fresh process: a broken driver may hang or kill it."""
    command = worker("survey", output, tiny=False)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return surveying.Survey(problem="CUDA did not answer within 90 s")
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        return surveying.Survey(problem=f"CUDA ended the process: {said[0] if said else ''}")
    return surveying.Survey(**json.loads((output / "survey.json").read_text()))


def work(name: str, output: Path, tiny: bool, resume: bool = False) -> int:
    """The body of a stage's process, or of one that a stage starts. Nobody reads the rows of the
    latter: it ends with 1 if one has failed."""
    if name == "survey":
        write(output / "survey.json", json.dumps(vars(surveying.survey())))
        return 0
    stage = Stage(output, name, tiny, resume)
    with report_compilations(stage):
        (WORKERS.get(name) or STAGES[name][0])(stage)
    return int(name in WORKERS and any(row.failed for row in stage.rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harvest", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--deadline", type=float, default=480.0, help="seconds for all stages")
    parser.add_argument("--output", type=Path, default=Path("harvest-output"))
    parser.add_argument(
        "--triton-cache",
        type=Path,
        default=CACHE,
        metavar="FOLDER",
        help="cache of compiled Triton kernels (default: %(default)s)",
    )
    parser.add_argument("--tiny", action="store_true", help="smallest sizes; also without a GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.output = args.output.absolute()
    args.stages = [name for name in args.stages.split(",") if name]
    unknown = sorted(set(args.stages) - set(STAGES))
    if unknown:
        parser.error(f"--stages: got {', '.join(unknown)}, expected some of {', '.join(STAGES)}")
    if args.deadline <= 0:
        parser.error(f"--deadline: got {args.deadline:g}, expected seconds above 0")
    problem = surveying.no_space(args.output)
    if problem:
        parser.error(f"--output: {problem}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if one failed, 2 if none can run."""
    args = parse(argv)
    if args.worker:
        return work(args.worker, args.output, args.tiny, args.resume)
    start = time.perf_counter()
    os.environ["TRITON_CACHE_DIR"] = str(args.triton_cache.absolute())
    here = survey(args.output)
    if here.problem and not args.tiny:
        print(
            f"{here.problem}.\nWithout a GPU these lines can be run, at the smallest sizes: "
            "TRITON_INTERPRET=1 python -m benchmarks.harvest --tiny", file=sys.stderr,
        )  # fmt: skip
        return 2
    print(here.device or f"dry run on the CPU: {here.problem}")
    for line in (*here.remarks, *(f"{s}: left out: {why}" for s, why in here.left_out.items())):
        print(f"  {line}")
    found = collect(args, here, start)
    text = summary.text(found, here.device)
    write(args.output / "summary.txt", text)
    print(text)
    return int(any(summary.failed(stage) for stage in found.values()))


def collect(
    args: argparse.Namespace, here: surveying.Survey, start: float
) -> dict[str, dict[str, Any]]:
    """Every stage's result, on disk after each; on Ctrl-C or SIGTERM the results so far."""
    found: dict[str, dict[str, Any]] = {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in args.stages:
            left = args.deadline - (time.perf_counter() - start)
            found[name] = {"rows": [], "problem": "", "seconds": 0.0}
            if name in here.left_out:
                found[name]["left_out"] = here.left_out[name]
            elif left < 5:
                found[name]["problem"] = "not started: no time left"
            else:
                limit = min(left, STAGES[name][1] * (10 if here.problem else 1))
                found[name] = run_stage(name, args.output, args.tiny, limit)
            print(summary.stage_line(name, found[name]), flush=True)
            save(found, here, args.output)
    except KeyboardInterrupt:
        found[name] = {**rows_of(name, args.output), "problem": "interrupted", "seconds": 0.0}
        save(found, here, args.output)
    finally:
        signal.signal(signal.SIGTERM, before)
    return found


def save(found: dict[str, dict[str, Any]], here: surveying.Survey, output: Path) -> None:
    """Write harvest.json and harvest.md."""
    whole = {"device": here.device, "remarks": here.remarks, "stages": found}
    write(output / "harvest.json", json.dumps(whole, indent=1))
    write(output / "harvest.md", summary.markdown(found, here.device))


if __name__ == "__main__":
    sys.exit(main())
