"""Stages that time kernels: the card's ceilings, attention, contrastive losses, the spectrogram."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import (
    attention_peers,
    bench_attention_gpu,
    bench_spectrogram_gpu,
    contrastive_peers,
)
from benchmarks.harness import ROOT, environment
from benchmarks.harvest import cases
from benchmarks.harvest.cases import Case
from benchmarks.harvest.measuring import (
    Run,
    Stage,
    kernel_table,
    own_stream,
    tool_for,
    worker,
    write,
)
from musiclm_fast import testing
from musiclm_fast.ops import contrastive_loss
from musiclm_fast.ops.contrastive._triton import MAX_DEPTH


def card(stage: Stage) -> None:
    """Versions, and the card's ceilings: a copy, a product, a launch."""
    for key, value in environment().items():
        stage.note(key, str(value))
    copy, product, launch = cases.card(stage.tiny)
    source = torch.randn(copy.shape["bytes"] // 4, device=stage.device)
    target = torch.empty_like(source)
    side = product.shape["side"]
    a, b = (torch.randn(side, side, device=stage.device, dtype=torch.bfloat16) for _ in range(2))
    one = torch.ones(1, device=stage.device)
    with own_stream(stage.gpu):
        stage.time(copy, "torch", lambda: target.copy_(source))
        stage.time(product, "torch", lambda: a @ b)
        stage.time(launch, "torch", lambda: one.add_(1))


def attention(stage: Stage) -> None:
    """Attention with a learned bias, forward and backward, against attention without one."""
    _attention(stage, cases.attention(stage.tiny))


def flex(stage: Stage) -> None:
    """FlexAttention with the learned table, compiled."""
    _attention(stage, cases.attention(stage.tiny, "flex"))


def peers(stage: Stage) -> None:
    """Other packages' attention and spectrograms, each compared with the reference first."""
    own = cases.peers(stage.tiny)
    _attention(stage, [case for case in own if "direction" in case.shape], checked=True)
    _spectrogram(stage, [case for case in own if "variant" in case.shape], checked=True)


def _attention(stage: Stage, members: Sequence[Case], checked: bool = False) -> None:
    functions = {name: peer.run for name, peer in attention_peers.PEERS.items()}
    if not stage.gpu:
        functions[cases.CUDNN] = attention_peers.flash
    for case in members:
        shape = case.shape
        for contender in stage.contenders(case):
            ours = contender.startswith("ours")
            function = functions.get(contender, bench_attention_gpu.ours)
            with stage.attempt(case.name, contender, optional=not ours), own_stream(stage.gpu):
                backward = shape["direction"] == "backward"
                if checked:
                    attention_peers.PEERS[contender].check(bench_attention_gpu.make_inputs(
                        2, shape["length"], 2, stage.device, shape["dtype"], False, False
                    ))  # fmt: skip
                inputs = {
                    key: x.detach().requires_grad_(x.requires_grad and backward)
                    if torch.is_tensor(x)
                    else x
                    for key, x in _inputs(
                        *(shape[key] for key in ("batch", "length", "heads")), stage.device,
                        shape["dtype"], *cases.OPTIONS.get(contender, cases.OPTIONS[cases.SHARED]),
                    ).items()
                }  # fmt: skip
                run: Run = functools.partial(function, inputs)
                if backward:
                    run = _backward(function(inputs), inputs, contender)
                stage.time(case, contender, run, memory=backward, graph=contender != cases.FLEX)
                if ours and backward:
                    note_kernels(stage, case.name, contender, run)


# Drawn on the CPU, half a second each; kept for the other direction and the other contenders. Each
# uses its own leaves: autograd returns to the stream on which a leaf was first used, and a capture
# allows no other stream.
_inputs = functools.lru_cache(maxsize=3)(bench_attention_gpu.make_inputs)


def _backward(out: torch.Tensor, inputs: dict[str, Any], contender: str) -> Run:
    peer = attention_peers.PEERS.get(contender)
    plain = peer is not None and not peer.biased
    leaves = [
        value for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.requires_grad and (not plain or name in "qkv")
    ]  # fmt: skip
    return functools.partial(
        torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True,
        allow_unused=True,
    )  # fmt: skip


def note_kernels(stage: Stage, case: str, contender: str, run: Run) -> None:
    """The nine longest kernels of a call."""
    if stage.gpu:
        parts = [f"{n[:40]} {ms:.3f} ms x {c:.0f}" for n, ms, c in kernel_table(run)[:9]]
        stage.note(f"kernels of {case}", "; ".join(parts), contender)


def contrastive(stage: Stage) -> None:
    """Losses of a large batch, forward and backward."""
    for case in cases.contrastive(stage.tiny):
        for contender in stage.contenders(case):
            ours = contender == cases.OURS
            with stage.attempt(case.name, contender, optional=not ours), own_stream(stage.gpu):
                step = loss(case.shape, stage.device, None if ours else contender)
                stage.time(case, contender, step, memory=True)
                if ours:
                    note_kernels(stage, case.name, contender, step)


def loss(shape: dict[str, Any], device: str, peer: str | None = None) -> Run:
    """Loss and gradients of a case of the contrastive losses; ours unless a peer is named."""
    kind = shape["kind"]
    inputs = testing.contrastive_inputs(
        shape["batch"], shape["depth"], dtype=shape["dtype"], device=device
    )
    if kind != "sigmoid":
        del inputs["bias"]
    if peer is not None:
        return contrastive_peers.PEERS[peer][1](inputs)
    leaves = list(inputs.values())
    return lambda: torch.autograd.grad(
        contrastive_loss(**inputs, kind=kind, backend="triton"), leaves
    )


def spectrogram(stage: Stage) -> None:
    """The spectrogram with masks against a copy of as many bytes and torchaudio."""
    _spectrogram(stage, cases.spectrogram(stage.tiny))


def _spectrogram(stage: Stage, members: Sequence[Case], checked: bool = False) -> None:
    backend = "cuda" if stage.gpu else "cpp"
    for case in members:
        for contender in stage.contenders(case):
            peer = contender not in (cases.OURS, "copy")
            with stage.attempt(case.name, contender, optional=peer), own_stream(stage.gpu):
                run = transform(case.shape, stage.device, backend, contender, checked)
                stage.time(case, contender, run)


def transform(
    shape: dict[str, Any], device: str, backend: str, contender: str, checked: bool = False
) -> Run:
    """A case of the spectrogram, with its gradient if the case has one."""
    variant = shape["variant"]
    wav = torch.randn(
        shape["clips"], shape["samples"], device=device, requires_grad="gradient" in variant
    )
    found = bench_spectrogram_gpu.contenders(wav, shape["n_fft"], variant, backend, 1, checked)
    run: Run = found[contender].build()
    return run


COUNTERS = {
    "gpu__time_duration.sum": "ns",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    # Cycles, not instructions: one instruction of Hopper holds the pipe for many.
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stall: memory",
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": "stall: wgmma",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "stall: wait",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "stall: barrier",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "stall: pipe",
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": "stall: shared",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
    "launch__occupancy_limit_shared_mem": "blocks by shared memory",
}


# By name, among torch's many small kernels. A C++ name may have a namespace.
OUR_KERNELS = (
    "(^|[ :])(normalize|prepare|stored_q|sums|logsumexp|merge|gradient|sigmoid|fold_margins"
    "|mel_ranges|((geglu_|hyper_)?(forward|backward))(_[a-z]+)?)_kernel"
)


def counters(stage: Stage) -> None:
    """Hardware counters of one launch of each kernel, by Nsight Compute."""
    tool = tool_for(stage, "ncu", one_launch)
    if tool is None:
        return
    metrics = list(COUNTERS)
    for _ in range(2):
        command = [
            tool, "--csv", "--print-units", "base", "--clock-control", "none",
            "--profile-from-start", "off", "--metrics", ",".join(metrics),
            "--kernel-name", f"regex:{OUR_KERNELS}", "--launch-count", "40",
            *worker("one_launch", stage.output, stage.tiny),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        write(stage.output / "ncu.csv", done.stdout + done.stderr[-3000:])
        found = counted(done.stdout)
        for name, text in found:
            stage.note(name, text, "ours")
        if found:
            return
        said = done.stdout + done.stderr
        stage.note("ncu", f"no counters: {said[-300:]}")
        # Some versions profile nothing if one name is unknown.
        unknown = [name for name in metrics if name.split(".")[0] in said]
        if not unknown:
            return
        metrics = [name for name in metrics if name not in unknown]


def counted(text: str) -> list[tuple[str, str]]:
    """Kernels and their counters from ncu's CSV."""
    import csv

    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[tuple[str, str], list[str]] = {}
    for entry in csv.DictReader(lines):
        metric = COUNTERS.get(entry["Metric Name"])
        if metric is not None:
            key = (entry["ID"], entry["Kernel Name"][:60])
            found.setdefault(key, []).append(f"{metric} {entry['Metric Value']}")
    return [(name, ", ".join(parts)) for (_, name), parts in found.items()]


def one_launch(stage: Stage) -> None:
    """The launches that :func:`counters` profiles: every kernel once, warm. Attention is last: its
    many launches of the same kernels may be cut off."""
    builds: dict[str, Callable[[], Run]] = {}
    backend = "cuda" if stage.gpu else "cpp"
    for case in cases.spectrogram(stage.tiny):
        if "gradient" in case.shape["variant"]:
            builds[case.name] = functools.partial(
                transform, case.shape, stage.device, backend, cases.OURS
            )
    for case in cases.contrastive(stage.tiny):
        if case.shape["depth"] <= MAX_DEPTH and case.shape["kind"] != "decoupled":
            small = {**case.shape, "batch": min(case.shape["batch"], 16_384)}
            builds[case.name] = functools.partial(loss, small, stage.device)
    backward = [c for c in cases.attention(stage.tiny) if c.shape["direction"] == "backward"]
    case = backward[len(backward) // 2]
    builds[case.name] = functools.partial(_attend, case.shape, stage)
    runs: list[Run] = []
    for name, build in builds.items():
        with stage.attempt(name, cases.OURS):
            run = build()
            run()
            runs.append(run)
    with _profiled(stage.gpu):
        for run in runs:
            run()
    stage.note("one launch of each kernel", f"{len(runs)} calls")


def _attend(shape: dict[str, Any], stage: Stage) -> Run:
    """Both directions of a few samples."""
    inputs = bench_attention_gpu.make_inputs(
        4 if stage.gpu else 1, shape["length"], shape["heads"], stage.device, shape["dtype"],
        False, False,
    )  # fmt: skip
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    grad = torch.randn_like(inputs["q"])
    return lambda: torch.autograd.grad(
        bench_attention_gpu.ours(inputs), leaves, grad, allow_unused=True
    )


@contextlib.contextmanager
def _profiled(gpu: bool) -> Iterator[None]:
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    yield
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
