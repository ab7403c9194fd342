"""One command for a CUDA GPU that is at hand for minutes: parity, speed, profile, in that order.

    python -m benchmarks.harvest                        # everything, about eight minutes
    python -m benchmarks.harvest --stages card,parity   # some stages
    python -m benchmarks.harvest --deadline 300         # stop starting stages after 300 s
    TRITON_INTERPRET=1 python -m benchmarks.harvest --tiny   # on a CPU: do these lines run?

Every stage is a process of its own with a deadline of its own; its results are on disk as soon as
they are there, and one that fails or is cut off is named with its error while the others go on. It
needs the environment's torch, Triton, pytest and numpy. What else a stage can use (the reference's
packages, peers, ``ncu``, ``compute-sanitizer``) it uses if it is there and names if it is not.

Writes ``harvest.json`` (all figures), ``harvest.md`` (tables) and a log per stage into the output
folder. A time is that between two CUDA events around one call, the median of many, so that it holds
the gaps of a CPU that launches too slowly; "kernels" is the sum of the kernels' own times in the
same call, from CUPTI, without the gaps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, environment, timed

Run = Callable[[], Any]


@dataclasses.dataclass
class Row:
    """One figure of a stage.

    Args:
        case: what was run; contender: who ran it.
        ms: median of one call between CUDA events; least, most: of all calls.
        kernels_ms: sum of the kernels' times of one call; launches: their number.
        tflops, gbs: operations and bytes that the job needs, over ``kernels_ms`` or ``ms``.
        memory: peak bytes beyond the inputs.
        note: what was found where it is no time, or why there is none.
    """

    case: str
    contender: str
    ms: float | None = None
    least: float | None = None
    most: float | None = None
    kernels_ms: float | None = None
    launches: int | None = None
    tflops: float | None = None
    gbs: float | None = None
    memory: int | None = None
    note: str = ""


class Stage:
    """Where a stage writes its rows: the file is whole after each."""

    def __init__(self, output: Path, name: str, tiny: bool) -> None:
        self.output, self.name, self.tiny = output, name, tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rows: list[Row] = []
        self.flush()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print("  ".join(f"{k}={_short(v)}" for k, v in vars(row).items() if v not in (None, "")))
        sys.stdout.flush()
        self.flush()

    def note(self, case: str, text: str, contender: str = "") -> None:
        self.add(Row(case, contender, note=text))

    def flush(self) -> None:
        path = self.output / f"stage-{self.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps([vars(r) for r in self.rows]))
        part.replace(path)

    @contextlib.contextmanager
    def attempt(self, case: str, contender: str) -> Iterator[None]:
        """A contender that raises is a row with the reason."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:300]
            self.note(case, f"{type(error).__name__}: {text}", contender)
            if self.device == "cuda" and isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()

    def time(
        self, case: str, contender: str, run: Run, *, operations: float = 0.0,
        traffic: float = 0.0, budget: float = 0.4, memory: bool = False, note: str = "",
    ) -> Row:  # fmt: skip
        """Measure ``run`` and add its row."""
        milliseconds = call_times(run, budget, self.tiny)
        kernels, launches = kernel_time(run) if self.device == "cuda" else (None, None)
        used = None
        if memory and self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            used = torch.cuda.max_memory_allocated() - before
        median = statistics.median(milliseconds)
        base = (kernels or median) / 1e3
        row = Row(
            case, contender, median, min(milliseconds), max(milliseconds), kernels, launches,
            operations / base / 1e12 if operations else None,
            traffic / base / 1e9 if traffic else None, used, note,
        )  # fmt: skip
        self.add(row)
        return row


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def call_times(run: Run, budget: float, tiny: bool) -> list[float]:
    """Milliseconds of single calls: three to warm up, then as many as ``budget`` seconds hold (5 to
    200)."""
    if not torch.cuda.is_available():
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


def kernel_time(run: Run, calls: int = 3) -> tuple[float | None, int | None]:
    """Milliseconds of all kernels of one call, and their number."""
    found = kernel_table(run, calls)
    if not found:
        return None, None
    return sum(ms for _, ms, _ in found), round(sum(n for _, _, n in found))


def kernel_table(run: Run, calls: int = 3) -> list[tuple[str, float, float]]:
    """Name, milliseconds and launches a call of every kernel, longest first."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events() or []:
        if "cuda" in str(event.device_type).lower():
            entry = found.setdefault(event.name, [0.0, 0.0])
            entry[0] += event.device_time / 1e3 / calls
            entry[1] += 1 / calls
    return sorted(((n, ms, c) for n, (ms, c) in found.items()), key=lambda f: -f[1])


def gradient_run(out: torch.Tensor, leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> Run:
    return functools.partial(
        torch.autograd.grad, out, leaves, grad, retain_graph=True, allow_unused=True
    )


# ---- stages


def card(stage: Stage) -> None:
    """Versions, and the two ceilings: a copy, a bf16 product."""
    for key, value in environment().items():
        stage.note(key, str(value))
    if stage.device == "cpu":
        return
    properties = torch.cuda.get_device_properties(0)
    stage.note("device", f"{properties.name}, {properties.multi_processor_count} SMs, "
               f"{properties.total_memory / 2**30:.0f} GiB")  # fmt: skip
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    stage.time("copy of 1 GiB", "torch", lambda: target.copy_(source), traffic=2.0 * 2**30)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    stage.time("8192^3 bf16 product", "torch", lambda: a @ b, operations=2.0 * 8192**3)
    empty = torch.empty(1, device="cuda")
    stage.time("a small launch", "torch", lambda: empty.add_(1))


def parity(stage: Stage) -> None:
    """The ops' tests on the device, in as many processes as there are processors."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    log = stage.output / "parity.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/ops", f"--junitxml={log}"]
    command += ["-n", str(workers), "-p", "no:cacheprovider", "--tb=short", "--maxfail=400"]
    if stage.device == "cpu":
        command += ["--collect-only"]
    start = time.perf_counter()
    # The compiler of a captured graph must not print into the report.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (stage.output / "parity.log").write_text(done.stdout + done.stderr)
    summary = [line for line in done.stdout.splitlines() if line.strip()][-1:]
    stage.note("tests", f"{summary[0] if summary else ''}; {time.perf_counter() - start:.0f} s")
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            stage.note("failed", line[:400])


def bits(stage: Stage) -> None:
    """One case of each kernel 200 times: the bits must be equal."""
    from musiclm_fast import testing
    from musiclm_fast.ops import attention, contrastive_loss, spectrogram

    times = 2 if stage.tiny or stage.device == "cpu" else 200
    dtype = torch.bfloat16 if stage.device == "cuda" else torch.float32

    def compare(name: str, step: Callable[[], list[torch.Tensor]]) -> None:
        with stage.attempt(name, "ours"):
            first = [t.clone() for t in step()]
            other = 0
            for _ in range(times - 1):
                same = all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))
                other += not same
            stage.note(name, f"{other} of {times - 1} runs gave other bits")

    for causal in (False, True):
        size = 40 if stage.device == "cpu" else 744
        inputs = testing.attention_inputs(2, 2, size, head_dim=64, dtype=dtype,
                                          device=stage.device, radius=200)  # fmt: skip
        grad = torch.randn_like(inputs["q"])

        def attend(inputs: Any = inputs, causal: bool = causal, grad: Any = grad) -> list[Any]:
            out = attention(**inputs, causal=causal, backend="triton")
            return [out, *testing.gradients(out, inputs, grad).values()]

        compare(f"attention, causal={causal}", attend)
    for kind in ("softmax", "sigmoid"):
        inputs = testing.contrastive_inputs(
            40 if stage.device == "cpu" else 4096, 128, dtype=dtype, device=stage.device
        )

        def lose(inputs: Any = inputs, kind: str = kind) -> list[Any]:
            loss = contrastive_loss(**inputs, kind=kind, backend="triton")
            return [loss, *testing.gradients(loss, inputs, torch.ones_like(loss)).values()]

        compare(f"contrastive, {kind}", lose)
    for sizes in (dict(n_fft=128, win_length=24, hop_length=12), _LONG_WINDOW):
        wav = torch.randn(4, 16_000, device=stage.device, requires_grad=True)
        window = torch.hann_window(sizes["win_length"], device=stage.device)

        def transform(wav: Any = wav, sizes: Any = sizes, window: Any = window) -> list[Any]:
            out = spectrogram(wav, window=window, **sizes)
            return [out, *torch.autograd.grad(out.sum(), wav)]

        compare(f"spectrogram, {sizes['win_length']} of {sizes['n_fft']}", transform)


_LONG_WINDOW = dict(n_fft=512, win_length=400, hop_length=160)


def _attention(stage: Stage, wanted: Sequence[str], lengths: Sequence[int]) -> None:
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks import bench_attention_gpu as bench

    gpu = stage.device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    tokens, heads = (bench.TOKENS, bench.HEADS) if gpu else (64, 1)

    def cudnn(inputs: dict[str, Any]) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*(inputs[n] for n in "qkv"))

    for length in lengths:
        batch = max(tokens // length, 1)
        case = f"B = {batch}, H = {heads}, N = {length:,}, D = {bench.HEAD_DIM}, bf16"
        found = dict(bench.contenders(batch, length, heads, stage.device, dtype))
        shared = found["flash"][1]
        if gpu:
            found["cuDNN, no bias"] = (cudnn, shared)
        work = 4.0 * batch * heads * length**2 * bench.HEAD_DIM
        for name in wanted:
            if name not in found:
                continue
            function, inputs = found[name]
            with stage.attempt(case, name):
                grad = torch.randn_like(inputs["q"])
                names = [
                    n for n, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad
                ]
                plain = name in ("flash", "cuDNN, no bias")
                leaves = [inputs[n] for n in names if not plain or n in "qkv"]
                stage.time(f"forward, {case}", name, functools.partial(
                    torch.no_grad()(function), inputs), operations=work)  # fmt: skip
                run = gradient_run(function(inputs), leaves, grad)
                stage.time(f"backward, {case}", name, run, operations=2.5 * work, memory=True)
                if gpu and name.startswith("ours"):
                    parts = [
                        f"{n[:40]} {ms:.3f} ms x {c:.0f}" for n, ms, c in kernel_table(run)[:9]
                    ]
                    stage.note(f"backward's kernels, {case}", "; ".join(parts), name)


def attention(stage: Stage) -> None:
    """Attention with a learned bias, forward and backward, beside attention without one."""
    lengths = (512, 1024, 2048) if stage.device == "cuda" else (32,)
    names = ("ours, shared", "ours, per sample", "ours, QK norm", "flash", "cuDNN, no bias",
             "SDPA + bias")  # fmt: skip
    _attention(stage, names, lengths)


def flex(stage: Stage) -> None:
    """FlexAttention with the learned table, compiled."""
    _attention(stage, ("FlexAttention",), (1024, 2048) if stage.device == "cuda" else ())


def contrastive(stage: Stage) -> None:
    """Losses of a large batch, forward and backward."""
    from benchmarks import bench_contrastive as bench
    from benchmarks import contrastive_peers
    from musiclm_fast import testing
    from musiclm_fast.ops import contrastive_loss

    gpu = stage.device == "cuda"
    batch = 65_536 if gpu else 40
    cases = [(kind, 128, torch.bfloat16) for kind in bench.KINDS]
    cases += [("sigmoid", 768, torch.bfloat16), ("softmax", 768, torch.bfloat16)]
    cases += [("softmax", 128, torch.float32), ("sigmoid", 128, torch.float32)]
    for kind, depth, dtype in cases if gpu else [("softmax", 16, torch.float32)]:
        case = f"{kind}, B = {batch:,}, d = {depth}, {str(dtype).removeprefix('torch.')}"
        inputs = testing.contrastive_inputs(batch, depth, dtype=dtype, device=stage.device)
        if kind != "sigmoid":
            del inputs["bias"]
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]

        def step(inputs: Any = inputs, kind: str = kind, leaves: Any = leaves) -> Any:
            loss = contrastive_loss(**inputs, kind=kind, backend="triton")
            return torch.autograd.grad(loss, leaves)

        work = 8.0 * batch**2 * depth
        with stage.attempt(case, "ours"):
            stage.time(case, "ours", step, operations=work, memory=True, budget=0.3)
            if gpu:
                parts = [f"{n[:40]} {ms:.2f} ms x {c:.0f}" for n, ms, c in kernel_table(step)[:6]]
                stage.note(f"kernels, {case}", "; ".join(parts), "ours")
        if not gpu or dtype != torch.bfloat16:
            continue
        for name, (their_kind, build) in contrastive_peers.PEERS.items():
            if their_kind != kind:
                continue
            with stage.attempt(case, name):
                made = testing.contrastive_inputs(batch, depth, dtype=dtype, device="cuda")
                made["bias"] = torch.tensor([-10.0], device="cuda", requires_grad=True)
                stage.time(case, name, build(made), operations=work, memory=True, budget=0.3)


def spectrogram(stage: Stage) -> None:
    """The spectrogram with masks beside a copy of as many bytes and torchaudio."""
    from benchmarks import bench_spectrogram as common
    from benchmarks import bench_spectrogram_gpu as bench
    from benchmarks.harness import Contender

    gpu = stage.device == "cuda"
    clips, samples = (common.CLIPS, common.SAMPLES) if gpu else (1, 8000)
    backend = "cuda" if gpu else "cpp"
    for n_fft in common.FRONT_ENDS:
        for variant in bench.VARIANTS:
            if variant == "log-mel" and n_fft != 512:
                continue
            gradient = "gradient" in variant
            wav = torch.randn(clips, samples, device=stage.device, requires_grad=gradient)
            given = bench.options(n_fft, samples, stage.device, variant == "log-mel")
            case = f"window {common.FRONT_ENDS[n_fft]['win_length']} of {n_fft}, {variant}"
            found: dict[str, Contender] = bench.contenders(wav, given, gradient, backend, 1)
            for name in ("ours", "copy", "torchaudio", "torch"):
                with stage.attempt(case, name):
                    run = found[name].build()
                    stage.time(case, name, run, traffic=found[name].traffic or 0.0, budget=0.15)


def _step_case(batch: int, dim: int = 512) -> Any:
    from benchmarks import bench_training_step as bench

    return bench.Case(10 * bench.SAMPLE_HZ, batch, dim=dim)


def _steps(stage: Stage, kind: str, wanted: Sequence[tuple[int, int, str]]) -> None:
    from benchmarks import bench_training_step as bench
    from musiclm_fast.ops import use_backend
    from musiclm_fast.training import cost

    gpu = stage.device == "cuda"
    for batch, dim, mode in wanted if gpu else [(0, 0, "")]:
        case = _step_case(batch, dim) if gpu else bench.TINY["tiny"]
        label = f"10 s x {batch}, dim {dim}, depth {case.depth}{mode}"
        operations = sum(op.operations for op in cost.step_ops(case.counted()))
        with stage.attempt(label, kind):
            order: dict[str, str] = {}
            if gpu and kind == bench.OURS:
                order = dict(attention="triton", contrastive="triton", spectrogram="cuda")
            with use_backend(**order) if order else contextlib.nullcontext():
                run = bench.step(kind, case, stage.device, mode)
                start = time.perf_counter()
                run()
                if gpu:
                    torch.cuda.synchronize()
                first = time.perf_counter() - start
                row = stage.time(label, kind, run, operations=operations, memory=True, budget=1.0,
                                 note=f"first call {first:.1f} s")  # fmt: skip
                if row.ms and gpu:
                    share = operations / row.ms * 1e3 / 1e12
                    stage.note(label, f"{share:.0f} TFLOP/s over the whole step, "
                               f"{1e3 * batch / row.ms:.0f} pairs/s", kind)  # fmt: skip
                if gpu and kind == bench.OURS and batch == 64:
                    _profile(stage, label, run)
        if gpu:
            torch.cuda.empty_cache()


def _profile(stage: Stage, label: str, run: Run) -> None:
    table = kernel_table(run, calls=2)
    for name, ms, count in table[:30]:
        stage.note(f"profile, {label}", f"{ms:8.3f} ms  x {count:5.0f}  {name[:110]}", "ours")
    torch.cuda.set_sync_debug_mode("warn")
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
    counted = {p: places.count(p) for p in dict.fromkeys(places)}
    stage.note(f"synchronisations, {label}", f"{len(places)}: {counted}", "ours")


def step(stage: Stage) -> None:
    """A whole training step of MuLaN, ours."""
    from benchmarks.bench_training_step import OURS

    bf16 = " (bf16)"
    _steps(stage, OURS, [(64, 512, bf16), (64, 512, ""), (4, 512, bf16), (64, 768, bf16)])


def step_reference(stage: Stage) -> None:
    """The same of the live reference."""
    from benchmarks.bench_training_step import THEIRS

    bf16 = " (bf16)"
    _steps(stage, THEIRS, [(4, 512, bf16), (4, 512, ""), (16, 512, bf16), (64, 512, bf16)])


def step_compiled(stage: Stage) -> None:
    """Ours through torch.compile."""
    from benchmarks.bench_training_step import OURS

    _steps(stage, OURS, [(64, 512, " (bf16, torch.compile)")])


def generation(stage: Stage) -> None:
    """Tokens a second of the semantic stage, guidance 3, ours and audiolm-pytorch's."""
    from benchmarks import bench_generation as bench

    bench.EMBEDS = bench.EMBEDS.to(stage.device)
    theirs, ours = (m.to(stage.device) for m in bench.pair())
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    tokens = 128 if stage.device == "cuda" else 4
    torch.set_default_device(stage.device)
    for name, run in (("ours", bench.ours_generate), ("audiolm-pytorch", bench.theirs_generate)):
        model = ours if name == "ours" else theirs
        with stage.attempt("semantic, 512 x 6", name):
            run(model, 8)
            seconds = timed(functools.partial(run, model, tokens))
            stage.add(Row(
                f"semantic, dim 512, depth 6, {tokens} tokens", name, 1e3 * seconds,
                gbs=weights * tokens / seconds / 1e9, note=f"{tokens / seconds:.0f} tokens/s",
            ))  # fmt: skip


COUNTERS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
    "launch__occupancy_limit_shared_mem": "blocks by shared memory",
}


def counters(stage: Stage) -> None:
    """Hardware counters of one launch of each kernel, by Nsight Compute."""
    tool = shutil.which("ncu")
    if tool is None or stage.device == "cpu":
        stage.note("ncu", "not run: " + ("no CUDA device" if tool else "ncu is not installed"))
        return
    command = [tool, "--csv", "--clock-control", "none", "--profile-from-start", "off",
               "--metrics", ",".join(COUNTERS), "--launch-count", "40",
               sys.executable, "-m", "benchmarks.harvest", "--worker", "one_launch",
               "--output", str(stage.output)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (stage.output / "ncu.csv").write_text(done.stdout + done.stderr[-3000:])
    import csv

    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for entry in csv.DictReader(lines):
        key = (entry["ID"], entry["Kernel Name"][:60])
        found.setdefault(key, {})[entry["Metric Name"]] = entry["Metric Value"]
    for (_, name), values in found.items():
        text = ", ".join(f"{COUNTERS[m]} {v}" for m, v in values.items() if m in COUNTERS)
        stage.note(name, text, "ours")
    if not found:
        stage.note("ncu", f"no counters: {(done.stdout + done.stderr)[-300:]}")


def one_launch(stage: Stage) -> None:
    """What :func:`counters` profiles: every kernel once, warm."""
    from benchmarks import bench_attention_gpu as bench
    from benchmarks import bench_spectrogram as common
    from benchmarks import bench_spectrogram_gpu
    from musiclm_fast import testing
    from musiclm_fast.ops import contrastive_loss

    inputs = bench.make_inputs(4, 1024, 8, "cuda", torch.bfloat16, False, False)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    grad = torch.randn_like(inputs["q"])
    latents = testing.contrastive_inputs(16_384, 128, dtype=torch.bfloat16, device="cuda")
    both = [latents["audio"], latents["text"]]
    wavs = []
    for n_fft in common.FRONT_ENDS:
        wav = torch.randn(64, 160_000, device="cuda", requires_grad=True)
        given = bench_spectrogram_gpu.options(n_fft, 160_000, "cuda", False)
        wavs.append(bench_spectrogram_gpu.contenders(wav, given, True, "cuda", 1)["ours"].build())

    def everything() -> None:
        torch.autograd.grad(bench.ours(inputs), leaves, grad)
        for kind in ("softmax", "sigmoid"):
            torch.autograd.grad(contrastive_loss(**latents, kind=kind, backend="triton"), both)
        for run in wavs:
            run()

    everything()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    everything()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def sanitizer(stage: Stage) -> None:
    """A small call of every kernel under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or stage.device == "cpu":
        stage.note("compute-sanitizer", "not run: not installed, or no CUDA device")
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m",
               "benchmarks.harvest", "--worker", "small_calls", "--output",
               str(stage.output)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (stage.output / "sanitizer.log").write_text(done.stdout + done.stderr)
    last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line][-1:]
    stage.note("compute-sanitizer memcheck", f"{last[0] if last else 'no summary'}; "
               f"exit {done.returncode}")  # fmt: skip


def small_calls(stage: Stage) -> None:
    """What :func:`sanitizer` watches."""
    stage.tiny = True
    bits(stage)


STAGES: dict[str, tuple[Callable[[Stage], None], float]] = {  # name -> function, its deadline in s
    "card": (card, 40),
    "parity": (parity, 150),
    "bits": (bits, 60),
    "attention": (attention, 70),
    "contrastive": (contrastive, 70),
    "spectrogram": (spectrogram, 40),
    "step": (step, 80),
    "step_reference": (step_reference, 80),
    "generation": (generation, 60),
    "counters": (counters, 70),
    "flex": (flex, 60),
    "step_compiled": (step_compiled, 120),
    "sanitizer": (sanitizer, 60),
}
WORKERS = {"one_launch": one_launch, "small_calls": small_calls}


def markdown(found: dict[str, Any]) -> str:
    """The tables of all stages."""
    lines = []
    for name, stage in found.items():
        lines += ["", f"## {name} ({stage['seconds']:.0f} s)", ""]
        if stage["problem"]:
            lines += [f"**{stage['problem']}**", ""]
        rows = [Row(**r) for r in stage["rows"]]
        if not rows:
            continue
        heads = ["case", "contender", "ms", "kernels ms", "launches", "TFLOP/s", "GB/s", "MiB",
                 "note"]  # fmt: skip
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for r in rows:
            times = "" if r.ms is None else f"{r.ms:.4g}"
            if r.least is not None and r.most is not None:
                times += f" ({r.least:.4g} to {r.most:.4g})"
            cells = [r.case, r.contender, times]
            cells += ["" if x is None else f"{x:.4g}"
                      for x in (r.kernels_ms, r.launches, r.tflops, r.gbs)]  # fmt: skip
            cells += ["" if r.memory is None else f"{r.memory / 2**20:.0f}", r.note]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines).lstrip() + "\n"


def run_stage(name: str, output: Path, tiny: bool, limit: float) -> dict[str, Any]:
    """A stage in its own process, ended at its deadline with what it has found."""
    log = output / f"stage-{name}.log"
    command = [sys.executable, "-m", "benchmarks.harvest", "--worker", name, "--output",
               str(output)]  # fmt: skip
    command += ["--tiny"] if tiny else []
    start = time.perf_counter()
    problem = ""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if process.wait(limit):
                end = [line for line in log.read_text().splitlines() if line.strip()][-1:]
                problem = f"exit {process.returncode}: {end[0] if end else ''}"[:400]
        except subprocess.TimeoutExpired:
            problem = f"cut off after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    path = output / f"stage-{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return {"rows": rows, "problem": problem, "seconds": time.perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harvest", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--deadline", type=float, default=480.0, help="seconds for all stages")
    parser.add_argument("--output", type=Path, default=Path("harvest-output"))
    parser.add_argument("--tiny", action="store_true", help="smallest sizes; also without a GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    output = args.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    if args.worker:
        function = WORKERS[args.worker] if args.worker in WORKERS else STAGES[args.worker][0]
        function(Stage(output, args.worker, args.tiny))
        return 0
    wanted = [name for name in args.stages.split(",") if name]
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        parser.error(f"--stages: got {', '.join(unknown)}, expected some of {', '.join(STAGES)}")
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("torch finds no CUDA device; TRITON_INTERPRET=1 with --tiny runs on a CPU")
    start = time.perf_counter()
    found: dict[str, Any] = {}
    for name in wanted:
        left = args.deadline - (time.perf_counter() - start)
        if left < 5:
            found[name] = {"rows": [], "problem": "not started: no time left", "seconds": 0.0}
        else:
            found[name] = run_stage(name, output, args.tiny, min(left, STAGES[name][1]))
        done = found[name]
        print(f"== {name}: {done['seconds']:.0f} s {done['problem']}", flush=True)
        for part, text in (("json", json.dumps(found)), ("md", markdown(found))):
            (output / f"harvest.{part}").write_text(text)
    for stage in found.values():
        for row in (Row(**r) for r in stage["rows"]):
            if row.ms is not None:
                kernels = "" if row.kernels_ms is None else f"kernels {row.kernels_ms:9.3f}"
                rate = "" if row.tflops is None else f"{row.tflops:6.1f} TFLOP/s"
                rate += "" if row.gbs is None else f"{row.gbs:7.0f} GB/s"
                print(f"{row.case[:62]:62} {row.contender[:22]:22} {row.ms:9.3f} ms {kernels} "
                      f"{rate}")  # fmt: skip
    return int(any(stage["problem"] for stage in found.values()))


if __name__ == "__main__":
    sys.exit(main())
