"""Writes the predictions and their pages: ``python -m benchmarks.predict``."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import triton

from benchmarks.harvest import cases
from benchmarks.predict.kernels import codes
from benchmarks.predict.model import CARDS, MODEL, Card
from benchmarks.predict.page import page
from benchmarks.predict.rules import RULES
from benchmarks.predict.stages import by_stage, stage_seconds
from benchmarks.predict.stored import RESULTS, Prediction, read


def predictions(card: Card) -> tuple[list[Prediction], dict[str, int]]:
    """Predictions of every case and contender, in the harvest's order; and the number of new
    specialisations of Triton kernels in each stage."""
    codes.clear()
    found = []
    compiled: dict[str, int] = {}
    for case in cases.all_cases():
        for contender in case.contenders:
            print(f"{case.name}: {contender}", file=sys.stderr, flush=True)
            before = len(codes)
            found.append(RULES[case.stage](case, contender, card))
            compiled[case.stage] = compiled.get(case.stage, 0) + len(codes) - before
    return found, compiled


def rounded(p: Prediction) -> Prediction:
    """Rounded to four digits."""

    def four(x: float | None) -> float | None:
        return None if x is None else float(f"{x:.4g}")

    kernels = [replace(k, ms=four(k.ms)) for k in p.kernels]
    return replace(p, ms=four(p.ms), kernels_ms=four(p.kernels_ms), kernels=kernels)


def make(name: str) -> dict[str, Any]:
    """The content of a card's file."""
    found, compiled = predictions(CARDS[name])
    found = [rounded(p) for p in found]
    return {
        "card": asdict(CARDS[name]), "model": asdict(MODEL), "triton": triton.__version__,
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
        "specialisations": compiled,
        "stages": stage_seconds(by_stage(found), compiled),
        "predictions": [asdict(p) for p in found],
        "other": None,
    }  # fmt: skip


def add_other(stored: dict[str, Any], name: str) -> None:
    """Add the kernels' ms that differ by 1% with this Triton to a file's content."""
    changed = []
    for p, before in zip(predictions(CARDS[name])[0], read(stored), strict=True):
        if p.kernels_ms and abs(p.kernels_ms / before.kernels_ms - 1) > 0.01:
            changed.append([p.case, p.contender, float(f"{p.kernels_ms:.4g}")])
    stored["other"] = {"triton": triton.__version__, "kernels_ms": changed}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict")
    parser.add_argument("--card", choices=list(CARDS), help="one card; all without it")
    parser.add_argument(
        "--other", action="store_true",
        help="keep the files' figures and add what this environment's Triton changes",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for name in [args.card] if args.card else CARDS:
        path = RESULTS / f"{name}-predicted.json"
        if args.other:
            stored = json.loads(path.read_text())
            add_other(stored, name)
        else:
            stored = make(name)
        text = json.dumps(stored, indent=1) + "\n"
        path.write_text(text)
        path.with_suffix(".md").write_text(page(json.loads(text)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
