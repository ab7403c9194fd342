"""The tables of a harvest: every figure as markdown, and the short table at the end."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks import predict, tables
from benchmarks.harvest import cases
from benchmarks.harvest.measuring import Row

Found = dict[str, dict[str, Any]]  # stage -> rows, problem, seconds


def failed(stage: dict[str, Any]) -> bool:
    """Whether a stage did not finish, or found an error."""
    return bool(stage["problem"]) or any(row["failed"] for row in stage["rows"])


def stage_line(name: str, stage: dict[str, Any]) -> str:
    """The result of a stage, in one line."""
    wrong = [f"{r['case']} {r['contender']}: {r['failed']}" for r in stage["rows"] if r["failed"]]
    parts = [f"== {name}: {stage['seconds']:.0f} s"]
    if stage.get("left_out"):
        parts.append("left out")
    if stage["problem"]:
        parts.append(stage["problem"])
    if wrong:
        parts.append(f"{len(wrong)} wrong; first: {wrong[0]}")
    return ", ".join(parts)


def markdown(found: Found, device: str) -> str:
    """The tables of all stages."""
    lines = [f"# {device or 'Dry run on a CPU'}"]
    for name, stage in found.items():
        lines += ["", f"## {name} ({stage['seconds']:.0f} s)", ""]
        for text in (stage["problem"], stage.get("left_out", "")):
            if text:
                lines += [f"**{text}**", ""]
        rows = [Row(**r) for r in stage["rows"]]
        if not rows:
            continue
        heads = ["case", "contender", "ms", "kernels ms", "launches", "replayed ms", "TFLOP/s",
                 "GB/s", "MiB", "note"]  # fmt: skip
        table = []
        for r in rows:
            times = "" if r.ms is None else f"{r.ms:.4g}"
            if r.least is not None and r.most is not None:
                times += f" ({r.least:.4g} to {r.most:.4g})"
            figures = (r.kernels_ms, r.launches, r.graph_ms, r.tflops, r.gbs)
            cells = [r.case, r.contender, times]
            cells += ["" if x is None else f"{x:.4g}" for x in figures]
            cells.append("" if r.memory is None else f"{r.memory / 2**20:.0f}")
            cells.append(" ".join(filter(None, (r.failed and f"**{r.failed}**", r.note))))
            table.append(cells)
        lines.append(tables.markdown(heads, table))
    return "\n".join(lines) + "\n"


HEADS = (
    "ms",
    "kernels",
    "replayed",
    "rate",
    "of limit",
    "predicted",
    "off",
    "parity",
    "times ours",
)


def text(found: Found, device: str) -> str:
    """The short table: failures, then every case with its share of the card's ceiling, its
    prediction and the ratio to the peers."""
    wrong = [stage_line(name, stage) for name, stage in found.items() if failed(stage)]
    lines = ["", "what failed", *(wrong or ["nothing"]), ""]
    if not device:
        lines += ["dry run on a CPU: these lines run, and their figures say nothing of a GPU", ""]
    rows = [Row(**r) for stage in found.values() for r in stage["rows"]]
    by_key = {(r.case, r.contender): r for r in rows if r.ms is not None}
    table = Table(by_key, predict.load(device), _ceilings(by_key), _parity(found))
    cells = [["", *HEADS]]
    by_name = {case.name: case for tiny in (True, False) for case in cases.all_cases(tiny)}
    for name in dict.fromkeys(r.case for r in rows if r.ms is not None):
        if name in by_name:
            cells += table.case(by_name[name])
    return "\n".join([*lines, tables.aligned(cells)]) + "\n"


def _ceilings(rows: dict[tuple[str, str], Row]) -> tuple[float | None, float | None]:
    """TFLOP/s of the card's product and GB/s of its copy, as measured."""
    found: list[float | None] = [None, None]
    for tiny in (True, False):
        copy, product, _ = cases.card(tiny)
        for case, place, rate in ((product, 0, "tflops"), (copy, 1, "gbs")):
            row = rows.get((case.name, "torch"))
            found[place] = getattr(row, rate) if row else found[place]
    return found[0], found[1]


def _parity(found: Found) -> dict[str, str]:
    """Op -> result of its tests and its repeated runs."""
    said: dict[str, str] = {}
    for op in ("attention", "contrastive", "spectrogram"):
        rows = [
            Row(**r)
            for name in ("parity", "bits") if name in found
            for r in found[name]["rows"] if op in r["case"]
        ]  # fmt: skip
        if any(r.failed for r in rows):
            said[op] = "wrong"
        elif any("passed" in r.note for r in rows):
            said[op] = "green"
        elif rows:
            said[op] = "bits alone"  # the tests were cut off, or not selected
    steps = [r for r in found.get("step", {"rows": []})["rows"] if "small step" in r["case"]]
    if steps:
        said["MuLaN"] = "wrong" if any(r["failed"] for r in steps) else "green"
    return said


@dataclasses.dataclass
class Table:
    """The figures of the short table.

    Args:
        rows: by case and contender.
        predicted: likewise.
        ceilings: TFLOP/s and GB/s of this card.
        checked: result of parity, by the first word of a case.
    """

    rows: dict[tuple[str, str], Row]
    predicted: dict[tuple[str, str], predict.Prediction]
    ceilings: tuple[float | None, float | None]
    checked: dict[str, str]

    def case(self, case: cases.Case) -> list[list[str]]:
        """The case's name, and the cells of each contender."""
        rows = {name: row for (where, name), row in self.rows.items() if where == case.name}
        lines = [[case.name]]
        for name, row in rows.items():
            ours = name.startswith("ours")
            cells = [_number(row.ms), _number(row.kernels_ms), _number(row.graph_ms),
                     *self._rate(row), *self._predicted(row),
                     self.checked.get(case.name.split()[0], "") if ours else ""]  # fmt: skip
            others = {who: other for who, other in rows.items() if not who.startswith("ours")}
            peers = [f"{who} {_own(other) / _own(row):.2f}" for who, other in others.items()]
            said = peers if ours else []
            if "tokens/s" in row.note:
                said = [*said, row.note]
            lines.append([f"  {name}", *cells, ", ".join(said)])
        return lines

    def _rate(self, row: Row) -> tuple[str, str]:
        rates = ((row.tflops, self.ceilings[0], "TF/s"), (row.gbs, self.ceilings[1], "GB/s"))
        for value, ceiling, unit in rates:
            if value is not None:
                return f"{value:.3g} {unit}", f"{value / ceiling:.0%}" if ceiling else ""
        return "", ""

    def _predicted(self, row: Row) -> tuple[str, str]:
        """The kernels' own time if both have it, else the whole call's."""
        guess = self.predicted.get((row.case, row.contender))
        if guess is None:
            return "", ""
        expected, measured = guess.ms, row.ms
        if guess.kernels_ms and row.kernels_ms:
            expected, measured = guess.kernels_ms, row.kernels_ms
        if not expected or not measured:
            return "", ""
        return _number(expected), f"x {measured / expected:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _own(row: Row) -> float:
    return row.kernels_ms or row.ms or float("nan")
