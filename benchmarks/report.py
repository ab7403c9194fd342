"""Reports results as a table for the terminal, a page and charts.

A store ``results/<device>.json`` maps a benchmark's name to its section: ``facts`` (device,
versions, commit, date, command), ``results`` and its seconds. :func:`write` also writes the
page ``<device>.md`` and the charts ``<device>-<name>-*.png``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.harness import MIB, Result, ratio

Sections = dict[str, dict[str, Any]]
CURVES = {"ours": "#1f6feb", "bound": "#9aa4b2"}
PEERS = ("#d1495b", "#edae49", "#66a182", "#8d5a97", "#00798c")
COLORS = {"ours": "#1f6feb", "peer": "#9aa4b2", "bound": "#d8dee6"}


def slug(device: str, mode: str = "quick") -> str:
    """A file name for a device: ``"AMD EPYC, 2 threads"`` -> ``"amd-epyc-2-threads"``."""
    stem = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{stem}-full" if mode == "full" else stem


def read(section: Mapping[str, Any]) -> list[Result]:
    """The results of a section."""
    return [Result(**r) for r in section["results"]]


def cases(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by job and case, in order."""
    found: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        found.setdefault((r.job, r.case), []).append(r)
    return found


def ours_of(results: Sequence[Result], like: Result) -> Result | None:
    """The result of ours that a peer is compared with: the one whose name ends in the same mode in
    brackets, else the first."""
    mine = [r for r in results if r.ours and r.seconds]
    mode = re.search(r"\(.*\)$", like.contender)
    same = [r for r in mine if mode and r.contender.endswith(mode.group())]
    return next(iter(same or mine), None)


def speedup(results: Sequence[Result], other: Result) -> str:
    """How many times faster ours is than ``other``, with its spread; of a bound, how much of it
    ours reaches; "" without a ratio."""
    mine = ours_of(results, other)
    if mine is None or other.ours or not other.seconds:
        return ""
    median, least, most = ratio(other.timing, mine.timing)
    if other.role == "bound":
        return f"at {median:.0%} ({least:.0%} to {most:.0%})"
    return f"{median:.2f}x ({least:.2f} to {most:.2f})"


def milliseconds(r: Result) -> str:
    """Median; with more than one round also the minimum and maximum."""
    median = number(1e3 * r.timing.median)
    if len(r.seconds) == 1:
        return median
    return f"{median} ({number(1e3 * min(r.seconds))} to {number(1e3 * max(r.seconds))})"


def number(x: float) -> str:
    """Three digits, or all digits of the integer part."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Cells of a table, its heading first."""
    heads = ["case", "contender", "ms", "TFLOP/s", "GB/s", "MiB", "ours against it", "note"]
    found = [heads]
    for (_, case), group in cases(results).items():
        for r in group:
            cells = [case, r.contender]
            if not r.seconds:
                found.append([*cells, "", "", "", "", "", r.reason or r.note])
                continue
            rates = (r.tflops, r.gigabytes_per_second)
            cells += [milliseconds(r), *("" if x is None else f"{x:.3g}" for x in rates)]
            cells.append("" if r.memory is None else f"{r.memory / MIB:.0f}")
            note = r.reason or r.note or ("once" if len(r.seconds) == 1 else "")
            found.append([*cells, speedup(group, r), note])
    used = [c for c in range(len(heads)) if c < 3 or any(row[c] for row in found[1:])]
    return [[row[c] for c in used] for row in found]


def table(results: Sequence[Result]) -> str:
    """For the terminal: a table per job."""
    jobs = dict.fromkeys(r.job for r in results)
    return "\n\n".join(
        f"{job}\n{tables.aligned(rows([r for r in results if r.job == job]))}" for job in jobs
    )


def markdown(results: Sequence[Result]) -> str:
    """For the page."""
    head, *rest = rows(results)
    return tables.markdown(head, rest)


def page(sections: Sections, charts: Mapping[str, Sequence[str]]) -> str:
    """The whole page; ``charts`` are the file names of each benchmark's."""
    device = next(iter(sections.values()))["facts"]["device"]
    lines = [
        f"# {device}",
        "",
        "Written by `python -m benchmarks.run`. Contenders of a case run in turn in one process; a",
        "time is the median of the rounds (least to greatest), a ratio the median of the rounds'",
        "ratios. MiB is the peak beyond what is held before the run, in a fresh process on a CPU.",
    ]
    for name, section in sorted(sections.items()):
        results = read(section)
        facts = section["facts"]
        jobs = list(dict.fromkeys(r.job for r in results))
        lines += ["", f"## {name}", ""]
        lines.append(
            f"`{facts['command']}` at commit {facts['commit']}, {facts['date']}, Python "
            f"{facts['python']}, torch {facts['torch']}, triton {facts['triton']}, musiclm-pytorch "
            f"{facts['musiclm-pytorch']}, audiolm-pytorch {facts['audiolm-pytorch']}; "
            f"{section['wall_seconds']:.0f} s."
        )
        for job in jobs:
            lines += ["", f"### {job}", "", markdown([r for r in results if r.job == job])]
        for chart in charts.get(name, ()):
            lines += ["", f"![{name}]({chart})"]
    return "\n".join(lines) + "\n"


def write(sections: Sections, store: Path, new: str) -> None:
    """Write the store and the page of all benchmarks, and the charts of the one that is ``new``."""
    store.parent.mkdir(parents=True, exist_ok=True)
    _replace(store, json.dumps(sections, indent=1, sort_keys=True) + "\n")
    drawn = draw(new, sections[new], store)
    for left in set(_charts(new, store)) - set(drawn):
        store.with_name(left).unlink()
    charts = {name: _charts(name, store) for name in sections}
    _replace(store.with_suffix(".md"), page(sections, charts))


def _charts(name: str, store: Path) -> list[str]:
    # the existing charts of a benchmark, its bars first
    found = [path.name for path in store.parent.glob(f"{store.stem}-{name}-*.png")]
    return sorted(found, key=lambda file: (not file.endswith("-bars.png"), file))


def _replace(path: Path, text: str) -> None:
    # atomic
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def draw(name: str, section: Mapping[str, Any], store: Path) -> list[str]:
    """The charts of a benchmark: bars against peers, and time and memory over each axis.

    Returns:
        Their file names; none if there is nothing to compare or matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    results = [r for r in read(section) if r.seconds]
    files = []
    for kind, figure in (("bars", _bars(results)), *_curves(results)):
        if figure is not None:
            path = store.with_name(f"{store.stem}-{name}-{kind}.png")
            figure.savefig(path, dpi=110, metadata={"Software": None})
            files.append(path.name)
    return files


def _bars(results: Sequence[Result]) -> Any:
    # one panel per case: time of each contender
    from matplotlib.figure import Figure

    groups = {key: group for key, group in cases(results).items() if len(group) > 1}
    if not groups:
        return None
    heights = [0.7 + 0.28 * len(group) for group in groups.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, ((job, case), group) in zip(axes, groups.items(), strict=True):
        values = [1e3 * r.timing.median for r in group]
        colors = [COLORS[r.role] for r in group]
        axis.barh([r.contender for r in group], values, color=colors)
        for place, (r, value) in enumerate(zip(group, values, strict=True)):
            against = speedup(group, r).split(" (")[0]
            against += {"x": " faster", "%": " of it"}.get(against[-1:], "")
            label = f" {number(value)} ms" + (f", ours {against}" if against else "")
            axis.text(value, place, label, va="center", fontsize=8)
        axis.set_xlim(0, max(values) * 1.3)
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.invert_yaxis()
        axis.set_title(f"{job}: {case}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("ms, shorter is better", fontsize=8)
    return figure


def _curves(results: Sequence[Result]) -> Iterable[tuple[str, Any]]:
    # per axis with two values or more: time, and memory, of each contender that has them
    from matplotlib.figure import Figure

    for job in dict.fromkeys(r.job for r in results):
        of_job = [r for r in results if r.job == job]
        for name in dict.fromkeys(axis for r in of_job for axis in r.axes):
            points = [r for r in of_job if name in r.axes]
            if len({r.axes[name] for r in points}) < 2:
                continue
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            left, right = figure.subplots(1, 2)
            peers = itertools.cycle(PEERS)
            for contender in dict.fromkeys(r.contender for r in points):
                line = [(r.axes[name], r) for r in points if r.contender == contender]
                line.sort(key=lambda point: point[0])
                role = line[0][1].role
                color = next(peers) if role == "peer" else CURVES[role]
                style = dict(marker="o", color=color, linestyle="--" if role == "bound" else "-")
                left.plot(
                    [x for x, _ in line], [r.timing.median for _, r in line], label=contender,
                    **style,
                )  # fmt: skip
                held = [(x, r.memory / MIB) for x, r in line if r.memory is not None]
                if held:
                    right.plot(*zip(*held, strict=True), label=contender, **style)
            for axis, label in ((left, "seconds"), (right, "peak memory, MiB")):
                axis.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
                ticks = sorted({r.axes[name] for r in points})
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.yaxis.set_major_formatter("{x:,g}")
                axis.minorticks_off()
                axis.grid(alpha=0.3)
                axis.spines[["top", "right"]].set_visible(False)
            left.legend(fontsize=8, frameon=False)
            figure.suptitle(job, fontsize=10)
            stem = re.sub(r"[^a-z0-9]+", "-", f"{job} {name}".lower()).strip("-")
            yield stem, figure
