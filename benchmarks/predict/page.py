"""The page of a card's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import tables
from benchmarks.harvest import cases
from benchmarks.harvest.cases import Case
from benchmarks.predict.model import PIPES, SOURCES, TENSOR_CYCLE, Card
from benchmarks.predict.stages import COMPILE_S, START_S
from benchmarks.predict.stored import Prediction, read


def page(stored: dict[str, Any]) -> str:
    """The page of a file's content."""
    card = Card(**stored["card"])
    stages: dict[str, list[Case]] = {}
    for case in cases.all_cases():
        stages.setdefault(case.stage, []).append(case)
    lines = [*_model(stored, card), "", *_seconds(stored)]
    for stage, members in stages.items():
        lines += ["", f"## {stage}", "", *_predictions(stored, card, stage, members)]
    return "\n".join(lines) + "\n"


def _model(stored: dict[str, Any], card: Card) -> list[str]:
    model = stored["model"]
    constants = [[name, f"{model[name]:g}", SOURCES[name]] for name in model]
    return [
        f"# {card.name}, predicted",
        "",
        f"Written by `python -m benchmarks.predict` on {stored['date']} from the code of Triton "
        f"{stored['triton']} for sm_90 and torch {stored['torch']}'s operators. No GPU has run "
        "anything here. `python -m benchmarks.harvest` measures the same cases.",
        "",
        "## The model",
        "",
        "A Triton kernel takes the longest of three times. **Instructions**: programs of the "
        "busiest SM x warps of a program / schedulers x cycles of a warp / clock / share reached. "
        "A warp's cycles are its instructions (limit *issue*), or the cycles for which they hold "
        "one pipe (*integer*, *float*, *mufu*, *memory*) or the tensor core (*tensor*). *issue* "
        f"reaches the share {model['issue']:g}, or {model['warp_issue']:g} times the warps of a "
        f"scheduler if that is less; a pipe reaches {model['pipe']:g}. If an SM holds one "
        "program at a time, nothing overlaps its products: *tensor* is added to *issue*. "
        "**Bytes**: its tensors, each once, over the bandwidth reached (*bandwidth*). **A minimum "
        "duration** (*launch*). The instructions of torch's operators are not counted: only their "
        "bytes or products. A call takes the longer of its kernels with gaps and of the CPU "
        "(*host*).",
        "",
        "*how* of a kernel has the factors: programs, those of the busiest SM, how many an SM "
        "holds at a time, a warp's instructions outside loops + turns x instructions of a turn, "
        "the bytes, and the time by each limit alone. "
        "`python -m benchmarks.sass` prints the loops by kind of instruction.",
        "",
        f"The card: {card.sms} SMs at {card.clock / 1e9:.2f} GHz; bandwidth "
        f"{card.bandwidth / 1e12:.3g} of nominal {card.nominal_bandwidth / 1e12:.3g} TB/s; bf16 "
        f"products {card.tensor / 1e12:.0f} of nominal {card.nominal_tensor / 1e12:.0f} TFLOP/s; "
        f"float32 products {card.float32 / 1e12:.0f} TFLOP/s.",
        "",
        tables.markdown(["constant", "value", "meaning and source"], constants),
        "",
        "Cycles of a pipe an instruction: "
        + ", ".join(f"{kind} {each}" for kind, (_, each) in PIPES.items())
        + f"; tensor: operations of a warp / {TENSOR_CYCLE}.",
        "",
        "Least certain: the share of issue slots that is reached (every attention and contrastive "
        "figure depends on it); the CPU time of a launch, which limits the short steps and "
        "generation; the L2 cache, whose hits count as memory traffic; bank conflicts and "
        "uncoalesced gathers, which are not counted; the spectrogram's kernels, of whose machine "
        "code the path of a frame was counted by hand; peers' rates, read off published curves or "
        "assumed (`PUBLISHED` in benchmarks/predict/model.py says which); what torch.compile "
        "fuses, which is assumed. In the steps, ours computes the spectrogram by its definition in "
        "torch, in some 24 kernels instead of one.",
    ]


def _seconds(stored: dict[str, Any]) -> list[str]:
    rows = [[name, f"{s:.0f}", how] for name, (s, how) in stored["stages"].items()]
    total = sum(s for s, _ in stored["stages"].values())
    return [
        "## Seconds of the stages, on 16 cores",
        "",
        f"Assumed: starts ({START_S:g} s: torch's import, the CUDA context), {COMPILE_S:g} s a "
        "specialisation, and what is described in words. The time to measure follows from the "
        "figures below and from how long a contender is repeated.",
        "",
        tables.markdown(["stage", "s", "made of"], [*rows, ["all", f"{total:.0f}", ""]]),
    ]


def _predictions(
    stored: dict[str, Any], card: Card, stage: str, members: Sequence[Case]
) -> list[str]:
    found = {(p.case, p.contender): p for p in read(stored)}
    other = stored["other"]
    changed = {(c, w): ms for c, w, ms in other["kernels_ms"]} if other else {}
    heads = ["case", "contender", "ms", "kernels ms", "launches", "limit", "rate",
             "of nominal", "how"]  # fmt: skip
    if other:
        heads.insert(4, f"on Triton {other['triton']}")
    rows, kernels = [], []
    for case in members:
        for who in case.contenders:
            p = found[case.name, who]
            row = [case.name, who, _number(p.ms), _number(p.kernels_ms), _number(p.launches),
                   p.bound, *_share(case, p, card), p.how]  # fmt: skip
            if other:
                row.insert(4, _number(changed.get((case.name, who))))
            rows.append(row)
            if stage in ("attention", "contrastive"):
                kernels += [[case.name, who, k.name, f"{k.launches}", _number(1e3 * k.ms),
                             k.bound, k.how] for k in p.kernels]  # fmt: skip
    lines = [tables.markdown(heads, rows)]
    if kernels:
        heads = ["case", "contender", "kernel", "launches", "us", "limit", "how"]
        lines += ["", "Their Triton kernels, one launch each:", "", tables.markdown(heads, kernels)]
    return lines


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _share(case: Case, p: Prediction, card: Card) -> tuple[str, str]:
    # what the harvest calls TFLOP/s or GB/s, and that over the card's nominal rate
    if not p.kernels_ms:
        return "", ""
    if case.operations:
        rate = case.operations / p.kernels_ms * 1e3
        return f"{rate / 1e12:.3g} TFLOP/s", f"{rate / card.nominal_tensor:.1%}"
    if case.traffic:
        rate = case.traffic / p.kernels_ms * 1e3
        return f"{rate / 1e9:.4g} GB/s", f"{rate / card.nominal_bandwidth:.1%}"
    return "", ""
