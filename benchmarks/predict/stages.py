"""The seconds of each stage of the harvest."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harvest import cases
from benchmarks.harvest.__main__ import STAGES
from benchmarks.predict.stored import Prediction

START_S = 4.0 + 2.0  # torch's import, the CUDA context
COMPILE_S = 0.5  # of one specialisation of a Triton kernel, once: the stages share the cache
SETUP_S = 0.3  # of a contender: its inputs, a profiler's start and end
MODEL_S = 2.0  # to build a model and its optimizer
CALLS = 4 + 3  # to warm up, and under the profiler
EXTRA: dict[str, tuple[float, str]] = {
    "card": (0.0, ""),
    "library": (35.0, "nvcc for one architecture on 16 cores, 30 s at most, and a first import"),
    "parity": (65.0, "690 specialisations and 425 tests, 345 s of CPU on 14 processes, 25 s; their "
               "own starts, 14 at once, 15 s; the tests' kernels, which share the GPU, 25 s"),
    "bits": (12.0, "12 specialisations and 6 x 200 short calls with gradients"),
    "flex": (24.0, "torch.compile of two lengths, forward and backward, 6 s each"),
    "step_captured": (2.0, "three warm-up steps on a side stream and the capture"),
    "step_compiled": (60.0, "torch.compile of the model, forward and backward"),
    "counters": (25.0, "40 launches of about ten passes, saved and restored: 0.6 s each"),
    "sanitizer": (40.0, "twice: the small calls at a fiftieth of their speed, and its own start"),
}  # fmt: skip


def stage_seconds(
    stages: dict[str, list[Prediction]], specialisations: dict[str, int]
) -> dict[str, tuple[float, str]]:
    """Seconds of each stage and what they are made of.

    Args:
        stages: the predictions of each.
        specialisations: new ones of Triton kernels in each stage.
    """
    budgets = {case.stage: case.budget for case in cases.all_cases()}
    found = {}
    for stage in STAGES:
        parts = [f"start {START_S:.0f}"]
        total_s = START_S
        measured = [p.ms / 1e3 for p in stages.get(stage, ()) if p.ms is not None]
        if measured:
            each = sum(max(budgets[stage], 5 * s) + CALLS * s + SETUP_S for s in measured)
            if stage == "generation":  # twice: warm, then timed
                each = sum(2 * s for s in measured)
            if stage.startswith(("step", "generation")):
                each += MODEL_S * len(measured)
            total_s += each
            parts.append(f"{len(measured)} contenders {each:.1f}")
        if compiled := specialisations.get(stage):
            total_s += compiled * COMPILE_S
            parts.append(f"{compiled} specialisations {compiled * COMPILE_S:.1f}")
        extra, reason = EXTRA.get(stage, (0.0, ""))
        if extra:
            total_s += extra
            parts.append(f"{reason} {extra:.0f}")
        found[stage] = (round(total_s, 1), "; ".join(parts))
    return found


def by_stage(found: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by the stage of their case."""
    wanted = {(c.name, who): c.stage for c in cases.all_cases() for who in c.contenders}
    stages: dict[str, list[Prediction]] = {}
    for p in found:
        stages.setdefault(wanted[p.case, p.contender], []).append(p)
    return stages
