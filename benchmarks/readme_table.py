"""Writes README's table of results from the files in ``results/``.

    python -m benchmarks.readme_table           # write it between the markers in README.md
    python -m benchmarks.readme_table --check   # exit status 1 if it is out of date

A row is a case with a headline: ours against the first peer of that case.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report, tables
from benchmarks.harness import MIB, ROOT, Result, ratio

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
RESULTS = ROOT / "benchmarks" / "results"


def _faster(mine: Result, peer: Result, bound: Result | None) -> str:
    median, least, most = ratio(peer.timing, mine.timing)
    text = f"{median:.1f}x ({least:.1f} to {most:.1f})"
    if bound is not None:
        text += f", {ratio(bound.timing, mine.timing)[0]:.0%} of the bound"
    return text


def _memory(mine: Result, peer: Result) -> str:
    if mine.memory is None or peer.memory is None:
        return ""
    # Below one MiB a ratio means nothing.
    less = f"{peer.memory / mine.memory:.1f}x less: " if mine.memory >= MIB else ""
    return f"{less}{mine.memory / MIB:,.0f} MiB, not {peer.memory / MIB:,.0f}"


def table(store: Path) -> str:
    """The table of one device; "" if no case has a headline."""
    sections: report.Sections = json.loads(store.read_text())
    facts = next(iter(sections.values()))["facts"]
    heading = [
        f"{facts['device']}; details and charts in "
        f"[{store.stem}.md](benchmarks/results/{store.stem}.md).",
        "",
    ]
    lines = []
    for name, section in sorted(sections.items()):
        facts = section["facts"]
        for group in report.cases(report.read(section)).values():
            mine = next((r for r in group if r.headline and r.seconds), None)
            peer = next((r for r in group if r.role == "peer" and r.seconds), None)
            if mine is None or peer is None:
                continue
            bound = next((r for r in group if r.role == "bound" and r.seconds), None)
            lines.append([
                f"{mine.headline}, against {peer.contender}", _faster(mine, peer, bound),
                _memory(mine, peer), f"`{name}`, {facts['date']}",
            ])  # fmt: skip
    heads = ["job", "faster", "memory", "measured by `python -m benchmarks.run`"]
    return "\n".join([*heading, tables.markdown(heads, lines)]) if lines else ""


def text(results: Path = RESULTS) -> str:
    """The text between the markers: a table per device."""
    stores = [
        s for s in sorted(results.glob("*.json")) if not s.stem.endswith(("-full", "-predicted"))
    ]
    return "\n\n".join(filter(None, map(table, stores)))


def insert(readme: str, content: str) -> str:
    """README with ``content`` between the markers.

    Raises:
        ValueError: a marker is missing or occurs twice.
    """
    for marker in (BEGIN, END):
        if readme.count(marker) != 1:
            raise ValueError(f"README.md: got {readme.count(marker)} of {marker}, expected one")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_table")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    found = path.read_text()
    wanted = insert(found, text())
    if args.check:
        lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), "README", "results")
        print("\n".join(lines))
        return int(found != wanted)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
