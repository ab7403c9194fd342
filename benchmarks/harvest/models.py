"""Stages that time whole jobs: MuLaN's training step, and generation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_training_step
from benchmarks.harness import timed
from benchmarks.harvest import cases
from benchmarks.harvest.measuring import (
    STAND_IN,
    Row,
    Run,
    Stage,
    captured,
    kernel_table,
    own_stream,
    write,
)
from musiclm_fast.ops import use_backend
from musiclm_fast.ops.spectrogram import _cuda

SMALL_STEP = "loss and gradients of a small step"
TRACE_BYTES = 16 << 20  # a larger trace is left out


def step(stage: Stage) -> None:
    """A training step of MuLaN, ours; for the first case also the profile, a trace and the calls
    that wait for the device."""
    if not stage.done(SMALL_STEP, cases.OURS):
        check_step(stage)
    _steps(stage, "step")


def step_upstream(stage: Stage) -> None:
    """A training step of MuLaN, upstream's."""
    try:
        from tests.upstream import live

        live.load()
    except ImportError as error:
        stage.note("musiclm-pytorch", f"left out: {error}")
        return
    _steps(stage, "step_upstream")


def step_compiled(stage: Stage) -> None:
    """Ours under torch.compile."""
    _steps(stage, "step_compiled")


def check_step(stage: Stage) -> None:
    """Loss and gradients of a short step: the kernels against the ops' references."""
    sizes = bench_training_step.TINY["tiny"]
    with stage.attempt(SMALL_STEP, cases.OURS), _kernels(stage.gpu):
        try:
            bench_training_step.check(sizes, stage.device)
            stage.note(SMALL_STEP, "agree", cases.OURS)
        except AssertionError as error:
            text = " ".join(str(error).split())[:200]
            stage.fail(SMALL_STEP, text, cases.OURS)


def _kernels(gpu: bool) -> contextlib.AbstractContextManager[None]:
    """Every op by its kernel, or an error: a fallback must not be timed as ours. The spectrogram
    runs on torch if the library has no CUDA kernels, which an earlier stage reports."""
    if not gpu:
        return contextlib.nullcontext()
    spectrogram = "cuda" if _cuda.available()[0] else "torch"
    return use_backend(attention="triton", contrastive="triton", spectrogram=spectrogram)


def _steps(stage: Stage, name: str) -> None:
    for number, case in enumerate(cases.steps(stage.tiny, name)):
        who, sizes, mode = (case.shape[key] for key in ("who", "sizes", "mode"))
        (contender,) = case.contenders
        if stage.done(case.name, contender):
            continue
        ours = who == bench_training_step.OURS
        with (
            stage.attempt(case.name, contender, optional=not ours),
            _kernels(stage.gpu and ours),
            own_stream(stage.gpu),
        ):
            run = bench_training_step.step(who, sizes, stage.device, mode)
            first = timed(run)
            row = stage.time(case, contender, run, memory=True, graph=False,
                             note=f"first call {first:.1f} s")  # fmt: skip
            _note_rate(stage, case, row, sizes.batch)
            if name == "step" and number == 0:
                profile(stage, case.name, run)


def _note_rate(stage: Stage, case: cases.Case, row: Row, batch: int) -> None:
    if row.ms and stage.gpu:
        stage.note(case.name, f"{case.operations / row.ms / 1e9:.0f} TFLOP/s over the whole step, "
                   f"{1e3 * batch / row.ms:.0f} pairs/s", row.contender)  # fmt: skip


def profile(stage: Stage, case: str, run: Run) -> None:
    """The kernels of a step, longest first, its trace, and the calls that wait for the device."""
    if not stage.gpu:
        stage.note(f"profile of {case}", STAND_IN)
        return
    trace = stage.output / "trace-step.json"
    table = kernel_table(run, calls=2, trace=trace)
    lines = [f"{ms:9.3f} ms  x {count:6.1f}  {name}" for name, ms, count in table]
    write(stage.output / "profile-step.txt", "\n".join(lines) + "\n")
    for line in lines[:30]:
        stage.note(f"profile of {case}", line[:150], cases.OURS)
    compress(trace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # warns that it is a prototype
        run()
        torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(w.filename).name}:{w.lineno}" for w in caught
        if "called a synchronizing" in str(w.message)
    ]  # fmt: skip
    counted = {place: places.count(place) for place in dict.fromkeys(places)}
    stage.note(f"synchronisations of {case}", f"{len(places)}: {counted}", cases.OURS)


def compress(trace: Path) -> None:
    """The trace as ``.gz``, unless that is too large to copy."""
    packed = trace.with_suffix(".json.gz")
    with trace.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    trace.unlink()
    if packed.stat().st_size > TRACE_BYTES:
        packed.unlink()


def step_captured(stage: Stage) -> None:
    """Forward, backward and optimizer of ours as one CUDA graph, with masks per sample; or why it
    cannot be captured."""
    for case in cases.steps(stage.tiny, "step_captured"):
        (contender,) = case.contenders
        with (
            stage.attempt(case.name, contender, optional=True),
            _kernels(stage.gpu),
            own_stream(stage.gpu),
        ):
            run = _capturable(case, stage.device)
            for _ in range(3):  # lazy state: the optimizer's, compiled kernels, self-checks
                run()
            start = time.perf_counter()
            graph, replay = None, run
            if stage.gpu:
                graph = torch.cuda.CUDAGraph()
                with captured(graph):
                    run()
                replay = graph.replay
            seconds = time.perf_counter() - start
            row = stage.time(case, contender, replay, graph=False,
                             note=f"captured in {seconds:.1f} s")  # fmt: skip
            _note_rate(stage, case, row, case.shape["sizes"].batch)


def _capturable(case: cases.Case, device: str) -> Run:
    sizes, (dtype, _) = case.shape["sizes"], bench_training_step.MODES[case.shape["mode"]]
    model = bench_training_step.build(bench_training_step.OURS, sizes, device)
    # The default's masks are drawn on the CPU: a capture cannot contain a blocking copy.
    model.audio.front_end = dataclasses.replace(model.audio.front_end, masks_per_sample=True)
    batch = bench_training_step.inputs(sizes, device)
    gpu = device == "cuda"
    adam = torch.optim.Adam(model.parameters(), **bench_training_step.ADAM, fused=True,
                            capturable=gpu)  # fmt: skip

    def run() -> torch.Tensor:
        adam.zero_grad(set_to_none=False)
        with torch.autocast(device, dtype) if dtype else contextlib.nullcontext():
            loss = model(**batch)
        loss.backward()
        adam.step()
        return loss.detach()

    return run


def generation(stage: Stage) -> None:
    """Tokens a second of the semantic stage, guidance 3, ours and audiolm-pytorch's."""
    from benchmarks import bench_generation

    try:
        theirs, ours = bench_generation.pair()
    except ImportError as error:
        stage.note("audiolm-pytorch", f"left out: {error}")
        from musiclm_fast.audiolm import SemanticTransformer

        theirs, ours = None, SemanticTransformer(**bench_generation.SIZES, drop_text_embeds=True)
        ours.eval().to_logits.bias.data[-1] = -1e9  # never ends
    bench_generation.EMBEDS = bench_generation.EMBEDS.to(stage.device)
    for case in cases.generation(stage.tiny):
        tokens = case.shape["tokens"]
        runs: dict[str, tuple[Any, Any]] = {cases.OURS: (bench_generation.ours_generate, ours)}
        if theirs is not None:
            runs["audiolm-pytorch"] = (bench_generation.theirs_generate, theirs)
        for contender, (generate, model) in runs.items():
            if stage.done(case.name, contender):
                continue
            with (
                stage.attempt(case.name, contender, optional=model is theirs),
                torch.device(stage.device),
            ):
                model.to(stage.device)
                run = functools.partial(generate, model)
                run(min(8, tokens))
                seconds = timed(functools.partial(run, tokens))
                row = Row(case.name, contender, 1e3 * seconds)
                if stage.gpu:
                    few = kernel_table(functools.partial(run, 8), calls=1)
                    row.kernels_ms = sum(ms for _, ms, _ in few) * tokens / 8
                    row.launches = round(sum(n for _, _, n in few) * tokens / 8)
                read = sum(p.numel() * p.element_size() for p in model.parameters()) * tokens
                row.gbs = read / seconds / 1e9
                row.note = f"{tokens / seconds:.0f} tokens/s" + (
                    "" if stage.gpu else f" {STAND_IN}"
                )
                stage.add(row)
