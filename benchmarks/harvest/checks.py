"""Stages that check: the compiled library, parity, equal bits, memory accesses."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_spectrogram import FRONT_ENDS
from benchmarks.harness import ROOT
from benchmarks.harvest.measuring import Stage, tool_for, worker, write
from musiclm_fast import _extension, testing
from musiclm_fast.ops import attention, contrastive_loss, spectrogram

DRY_TESTS = "n1 or two-narrow"


def library(stage: Stage) -> None:
    """The compiled library: used if it has CUDA kernels for this GPU, else built."""
    status = _extension.extension_status()
    stage.note("as found", status.reason or describe(status.facts))
    if not stage.gpu:
        return
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    if status.loaded and runs_on(status.facts["cuda_archs"], int(capability)):
        return
    environ = {
        **os.environ, "MUSICLM_FAST_BUILD": "1", "MUSICLM_FAST_CUDA": "1",
        "MUSICLM_FAST_CUDA_ARCHS": f"{capability}-real",
    }  # fmt: skip
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        stage.fail("build", lines[-1] if lines else f"exit {done.returncode}")
    else:
        stage.note("build", f"built for compute capability {capability}")


def describe(facts: dict[str, Any]) -> str:
    """A library's build in words."""
    cuda = ", ".join(facts["cuda_archs"]) or "none"
    return f"{facts['compiler']}, CUDA architectures: {cuda}"


def runs_on(archs: list[str], capability: int) -> bool:
    """Whether code for architectures as CMake names them runs on a GPU: machine code on later minor
    versions, PTX (no suffix, or ``-virtual``) on all later GPUs."""
    for arch in archs:
        match = re.fullmatch(r"(\d+)([af]?)(-real|-virtual)?", arch)
        if match is None:
            continue
        built, exact, kind = int(match[1]), match[2], match[3]
        if built == capability or (not exact and built // 10 == capability // 10
                                   and built <= capability):  # fmt: skip
            return True
        if kind != "-real" and not exact and built <= capability:
            return True
    return False


def parity(stage: Stage) -> None:
    """The ops' tests for a GPU, in parallel; in a dry run a few, in Triton's interpreter."""
    report = stage.output / "parity.json"
    command = [
        sys.executable, "-m", "tests.parallel", "--report", str(report), "-m", "gpu", "tests/ops",
        *([] if stage.gpu else ["-k", DRY_TESTS]),
    ]  # fmt: skip
    # At the deadline both get SIGTERM: the tests' process then writes its report and ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before = cached_kernels()
    with (stage.output / "parity.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    said = (stage.output / "parity.log").read_text().strip().splitlines()[-1:]
    results = report.with_suffix(".jsonl")
    tests = [json.loads(line) for line in results.read_text().splitlines()] if code != 2 else []
    outcomes = {test["id"].split("::")[0]: collections.Counter() for test in tests}
    for test in tests:
        outcomes[test["id"].split("::")[0]][test["outcome"]] += 1
        if test["outcome"] not in ("passed", "skipped", "xfailed"):
            stage.fail(test["id"], " ".join(test["text"].split())[-300:])
    for file, counts in outcomes.items():
        stage.note(file, ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    (stage.fail if code else stage.note)("all tests", said[0] if said else f"exit {code}")
    compiled = cached_kernels() - before
    stage.note("Triton kernels", f"{before} were in the cache, {compiled} more were compiled")


def cached_kernels() -> int:
    """Kernels in Triton's cache."""
    return sum(1 for _ in Path(os.environ.get("TRITON_CACHE_DIR", "")).glob("*/*.cubin"))


def bits(stage: Stage) -> None:
    """One case of each kernel 200 times: equal bits, or a race."""
    times = 200 if stage.gpu and not stage.tiny else 2
    for name, run in small_cases(stage).items():
        if stage.done(name, "ours"):
            continue
        with stage.attempt(name, "ours"):
            first = [t.clone() for t in run()]
            other = sum(
                not all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
                for _ in range(times - 1)
            )
            text = f"{other} of {times - 1} runs gave other bits"
            (stage.fail if other else stage.note)(name, text, "ours")


def small_cases(stage: Stage) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Name -> function that returns outputs and gradients of a kernel."""
    dtype = torch.bfloat16 if stage.gpu else torch.float32
    found: dict[str, Callable[[], list[torch.Tensor]]] = {}
    for causal in (False, True):
        inputs = testing.attention_inputs(
            2, 2, 40 if stage.tiny else 744, head_dim=64, radius=200, dtype=dtype,
            device=stage.device,
        )  # fmt: skip
        grad = torch.randn_like(inputs["q"])

        def attend(inputs: Any = inputs, causal: bool = causal, grad: Any = grad) -> list[Any]:
            out = attention(**inputs, causal=causal, backend="triton")
            return [out, *testing.gradients(out, inputs, grad).values()]

        found[f"attention{', causal' if causal else ''}"] = attend
    for kind in ("softmax", "sigmoid"):
        inputs = testing.contrastive_inputs(
            40 if stage.tiny else 4096, 16 if stage.tiny else 128, dtype=dtype, device=stage.device
        )

        def lose(inputs: Any = inputs, kind: str = kind) -> list[Any]:
            loss = contrastive_loss(**inputs, kind=kind, backend="triton")
            return [loss, *testing.gradients(loss, inputs, torch.ones_like(loss)).values()]

        found[f"contrastive {kind}"] = lose
    backend = "cuda" if stage.gpu else "cpp"
    for sizes in FRONT_ENDS.values():
        wav = torch.randn(4, 16_000, device=stage.device, requires_grad=True)
        window = torch.hann_window(sizes["win_length"], device=stage.device)

        def transform(wav: Any = wav, sizes: Any = sizes, window: Any = window) -> list[Any]:
            out = spectrogram(wav, window=window, backend=backend, **sizes)
            return [out, *torch.autograd.grad(out.sum(), wav)]

        found[f"spectrogram {sizes['win_length']} of {sizes['n_fft']}"] = transform
    return found


def sanitizer(stage: Stage) -> None:
    """A small call of every kernel under compute-sanitizer."""
    tool = tool_for(stage, "compute-sanitizer", small_calls)
    if tool is None:
        return
    for check in ("memcheck", "racecheck"):
        command = [
            tool, "--tool", check, "--error-exitcode", "9", "--launch-timeout", "60",
            "--report-api-errors", "no",  # torch looks up newer symbols, which counts as an error
            *worker("small_calls", stage.output, tiny=True),
        ]  # fmt: skip
        # Every tensor is its own allocation: in torch's cache an overrun would stay undetected.
        environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        write(stage.output / f"sanitizer-{check}.log", done.stdout + done.stderr)
        last = [line for line in done.stdout.splitlines() if "SUMMARY" in line][-1:]
        text = f"{last[0] if last else 'no summary'}; exit {done.returncode}"
        (stage.fail if done.returncode else stage.note)(f"compute-sanitizer {check}", text)


def small_calls(stage: Stage) -> None:
    """The calls that :func:`sanitizer` checks."""
    for name, run in small_cases(stage).items():
        with stage.attempt(name, "ours"):
            stage.note(name, f"{len(run())} results", "ours")
