"""The benchmark suite: what it refuses, what it stores, and that every benchmark runs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness, readme_table, report, roofline, run, tables
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast import cost

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("matplotlib", reason="needs the bench extra")


def always(work: Callable[[], Any] = lambda: None) -> Callable[[], Callable[[], Any]]:
    return lambda: work


def fail() -> None:
    raise AssertionError("gradient of q is off by 3.0e-01\nand more")


def test_no_speed_without_parity() -> None:
    ran: list[str] = []
    contenders = {
        "ours": Contender(always(lambda: ran.append("ours")), role="ours"),
        "peer": Contender(always(lambda: ran.append("peer"))),
    }
    found = harness.measure("op", "case", contenders, Settings(), check=fail)
    assert not ran
    assert [r.seconds for r in found] == [[], []]
    assert found[0].reason == "parity check failed: gradient of q is off by 3.0e-01"
    assert found[1].reason == "not timed: parity check failed"
    table = report.table(found)
    assert "parity check failed" in table
    assert "x (" not in table


def test_a_benchmark_whose_parity_fails_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders = {"ours": Contender(always(), role="ours")}
    found = harness.measure("op", "case", contenders, Settings(), check=fail)
    monkeypatch.setattr(run, "run_apart", lambda *_: section(found))
    assert run.run_all(["op"], Settings(), tmp_path, resume=False) == 1
    assert "failed: op" in capsys.readouterr().err


def test_a_peer_that_cannot_run_is_listed_with_the_reason() -> None:
    def absent() -> Callable[[], Any]:
        raise ImportError("no module named siglip_kernel")

    def breaks() -> None:
        raise RuntimeError("needs\n  a GPU")

    contenders = {
        "ours": Contender(always(), role="ours"),
        "absent": Contender(absent),
        "breaks": Contender(always(breaks)),
        "no memory": Contender(always(), memory=breaks),  # type: ignore[arg-type]
    }
    found = harness.measure("op", "case", contenders, Settings(), check=lambda: None)
    reasons = {r.contender: r.reason for r in found}
    assert reasons == {
        "ours": "",
        "absent": "ImportError: no module named siglip_kernel",
        "breaks": "RuntimeError: needs a GPU",
        "no memory": "",
    }
    assert found[3].note == "memory: RuntimeError: needs a GPU"
    assert all(bool(r.seconds) == (r.contender not in ("absent", "breaks")) for r in found)


def test_ours_that_cannot_run_is_an_error() -> None:
    def breaks() -> None:
        raise RuntimeError("a bug")

    contenders = {"ours": Contender(always(breaks), role="ours")}
    with pytest.raises(RuntimeError, match="a bug"):
        harness.measure("op", "case", contenders, Settings(), check=lambda: None)


def test_contenders_run_in_turn_and_slow_ones_once() -> None:
    ran: list[str] = []
    contenders = {
        "ours": Contender(always(lambda: ran.append("o")), role="ours"),
        "slow": Contender(always(lambda: ran.append("s")), once=True),
        "peer": Contender(always(lambda: ran.append("p"))),
    }
    found = harness.measure("op", "case", contenders, Settings(), check=lambda: None, rounds=3)
    assert "".join(ran) == "op" + "osp" + "op" * 2
    assert [len(r.seconds) for r in found] == [3, 1, 3]
    only = harness.measure(
        "op", "case", contenders, Settings(only_ours=True), check=lambda: None, rounds=1
    )
    assert [r.contender for r in only] == ["ours"]


def test_what_is_slow_and_large_runs_in_a_process_of_its_own() -> None:
    def breaks() -> tuple[float, int]:
        raise RuntimeError("out of memory")

    ours = Contender(always(), role="ours")
    contenders = {
        "ours": ours,
        "large": Contender(always(fail), apart=lambda: (9.0, 2**30)),
        "too large": Contender(always(fail), apart=breaks),
    }
    found = harness.measure("op", "case", contenders, Settings(), check=lambda: None)
    large, too_large = found[1:]
    assert (large.seconds, large.memory) == ([9.0], 2**30)
    assert "process of its own" in report.table(found)
    assert (too_large.seconds, too_large.reason) == ([], "RuntimeError: out of memory")


def pages(count: int) -> tuple[int, int, int]:
    """Process, threads, and the peak of touching so many bytes; for a process of its own."""
    import torch

    peak = harness.extra_memory(lambda: lambda: torch.ones(count // 4).sum())
    return os.getpid(), torch.get_num_threads(), peak


def test_a_fresh_process_computes_measures_and_raises() -> None:
    mib = harness.MIB
    with harness.one_thread():
        first, threads, peak = harness.in_fresh_process(pages, 256 * mib)
    second, _, small = harness.in_fresh_process(pages, mib)
    assert len({os.getpid(), first, second}) == 3
    assert threads == 1
    assert 256 * mib <= peak < 320 * mib
    assert small < 64 * mib
    with pytest.raises(AssertionError, match="off by"):
        harness.in_fresh_process(fail)


def test_every_op_and_whole_job_is_in_the_suite() -> None:
    ops = {p.parent.name for p in (ROOT / "musiclm_fast" / "ops").glob("*/op.py")}
    jobs = {"training_step", "embed_folder", "semantic_step", "generation"}
    assert ops | jobs <= set(run.names())
    assert ops | jobs <= set(run.default_names("quick"))
    assert "attention_gpu" in run.default_names("gpu")
    assert not {"attention_gpu", "lengths"} & set(run.default_names("quick"))
    assert "lengths" in run.default_names("full")


def test_ratio_is_taken_round_by_round() -> None:
    slow, fast = harness.Timing([2.0, 8.0, 9.0]), harness.Timing([1.0, 2.0, 3.0])
    assert harness.ratio(slow, fast) == (3.0, 2.0, 4.0)
    assert harness.ratio(harness.Timing([6.0]), fast) == (3.0, 2.0, 6.0)


def results(**ours: Any) -> list[Result]:
    mib = harness.MIB
    return [
        Result("op", "10 s", "ours", "ours", [1.0, 2.0], operations=3e12, traffic=6e9,
               memory=2 * mib, axes={"seconds of audio": 10}, headline="the op", **ours),
        Result("op", "10 s", "peer", "peer", [4.0, 6.0], memory=10 * mib,
               axes={"seconds of audio": 10}),
        Result("op", "10 s", "bound", "bound", [0.5, 1.0]),
        Result("op", "20 s", "ours", "ours", [2.0], memory=4 * mib, axes={"seconds of audio": 20}),
        Result("op", "20 s", "peer", "peer", reason="out of memory"),
    ]  # fmt: skip


def section(found: list[Result], **facts: str) -> dict[str, Any]:
    known = harness.environment() | {"device": "Some GPU, 80 GB", "command": "x"} | facts
    return {"facts": known, "results": [dataclasses.asdict(r) for r in found], "wall_seconds": 1.0}


def test_table_states_rates_ratios_and_reasons() -> None:
    told = report.table(results())
    job, head, first, *rest = (line.split("  ") for line in told.splitlines())
    assert "1,500 (1,000 to 2,000)" in told
    assert "3.50x (3.00 to 4.00)" in told
    assert "at 50% (50% to 50%)" in told
    assert "out of memory" in told
    cells = [cell.strip() for cell in first if cell.strip()]
    assert cells[:2] == ["10 s", "ours"]
    assert cells[3:] == ["2", "4", "2"]  # TFLOP/s, GB/s, MiB


def test_tables() -> None:
    assert tables.markdown(["a", "b"], [["x|y", ""]]) == "| a | b |\n| --- | --- |\n| x\\|y |  |"
    rows = [["", "ms"], ["a heading as long as it likes"], ["  one", "1.25"], ["  fourteen", "2"]]
    assert tables.aligned(rows).splitlines() == [
        "            ms", "a heading as long as it likes", "  one       1.25", "  fourteen  2",
    ]  # fmt: skip


def test_sections_are_merged_and_written_with_charts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"one": section(results()), "two": section(results(), commit="other")}
    monkeypatch.setattr(run, "run_apart", lambda name, *_: sections[name])
    monkeypatch.setattr(run, "environment", lambda: sections["one"]["facts"])
    assert run.run_all(["one"], Settings(), tmp_path, resume=False) == 0
    assert run.run_all(["two"], Settings(), tmp_path, resume=False) == 0
    store = tmp_path / "some-gpu-80-gb.json"
    assert set(json.loads(store.read_text())) == {"one", "two"}
    page = store.with_suffix(".md").read_text()
    for wanted in ("# Some GPU, 80 GB", "## one", "## two", "at commit other", "torch 2."):
        assert wanted in page
    charts = sorted(path.name for path in tmp_path.glob("*.png"))
    assert charts == sorted(
        f"some-gpu-80-gb-{name}-{kind}.png"
        for name in ("one", "two")
        for kind in ("bars", "op-seconds-of-audio")
    )
    assert all(f"({chart})" in page for chart in charts)
    assert not list(tmp_path.glob("*.part"))


def test_cases_are_measured_one_by_one() -> None:
    contenders = {"ours": Contender(always(), role="ours")}
    wanted = Settings(case="10 s")
    assert harness.measure("op", "20 s x 2", contenders, wanted, check=fail) == []
    assert harness.measure("op", "10 s x 2", contenders, wanted, check=lambda: None)
    before = section(results(), commit="a")
    now = section([dataclasses.replace(results()[0], seconds=[7.0])], commit="a")
    both = report.read(run.merged(before, now))
    assert [(r.case, r.contender) for r in both] == [
        ("20 s", "ours"), ("20 s", "peer"), ("10 s", "ours"),
    ]  # fmt: skip
    assert both[-1].seconds == [7.0]
    later = section(results()[:1], commit="b")
    assert len(report.read(run.merged(before, later))) == 1


def test_resume_leaves_out_what_this_commit_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    here = section(results())

    def run_apart(name: str, *_: Any) -> dict[str, Any]:
        asked.append(name)
        return here

    monkeypatch.setattr(run, "run_apart", run_apart)
    monkeypatch.setattr(run, "environment", lambda: here["facts"])
    for _ in range(2):
        run.run_all(["one"], Settings(), tmp_path, resume=True)
    run.run_all(["one"], Settings(), tmp_path, resume=False)
    assert asked == ["one", "one"]


def test_readme_table_holds_the_headlines(tmp_path: Path) -> None:
    store = tmp_path / "gpu.json"
    store.write_text(json.dumps({"one": section(results())}))
    told = readme_table.text(tmp_path)
    assert "| the op, against peer | 3.5x (3.0 to 4.0), 50% of the bound | 5.0x less: 2 MiB" in told
    assert told.count("\n| ") == 3  # the heading, its line and one row
    store.write_text(json.dumps({"one": section([])}))
    assert readme_table.text(tmp_path) == ""
    marked = f"a\n{readme_table.BEGIN}\nold\n{readme_table.END}\nb\n"
    assert readme_table.insert(marked, "new") == marked.replace("old", "new")
    with pytest.raises(ValueError, match="got 0 of"):
        readme_table.insert("no markers", "new")


def test_readme_is_what_the_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    """Where this fails, results came in: `python -m benchmarks.readme_table` writes the table."""
    assert readme_table.main(["--check"]) == 0, capsys.readouterr().out


def test_roofline_stands_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = cost.Device("Some GPU", {"bf16": 2e15, "float32": 1e15}, 1e15, 1e12)
    measured = [Result("MuLaN training step", "README", "ours", "ours", [1.25])]
    (tmp_path / "some-gpu.json").write_text(json.dumps({"training_step": section(measured)}))
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    head, _, readme, *others = roofline.table_of_steps([device]).splitlines()
    assert head.endswith("| Some GPU float32, ms | Some GPU bf16, ms | Some GPU, measured ms |")
    assert readme.startswith("| README | 0.23")
    assert readme.endswith("| 1250 |")
    assert all(line.endswith("|  |") for line in others)
    ops = roofline.table_of_ops("README", device)
    assert "| text: up |" in ops
    assert "| optimizer |" in ops
    slow = cost.Device("slow", {"float32": 1e9}, 1e9, 1e15)
    assert "memory |" not in roofline.table_of_ops("README", slow)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "got nothing, expected some of"),
        (["--mode", "gpu"], "--device: got cuda, expected cpu"),
    ],
)
def test_bad_command_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


ALL_TINY = """
import sys
from benchmarks import report, run
from benchmarks.harness import Settings

for name in run.names():
    found = run.run_here(name, Settings(sys.argv[1], "cpu", tiny=True))
    print(report.table(found))
    assert not any(r.reason and r.ours for r in found), name
    print("ran", name, len(found))
"""


@pytest.mark.aot
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles for real")
def test_launches_and_their_cpu_time() -> None:
    pytest.importorskip("triton")
    from benchmarks import bench_launch

    found = bench_launch.results(Settings(tiny=True))
    cases = {r.case for r in found}
    assert len(found) == 2 * len(cases)
    assert {r.contender for r in found} == {"package", "package and Triton"}
    (forward,) = (c for c in cases if c.startswith("attention") and ": forward, " in c)
    assert not forward.endswith(" 0 launches")
    assert all(len(r.seconds) == 2 and min(r.seconds) > 0 for r in found)
    assert all(r.note.startswith("launches: ") for r in found)


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("mode", ["quick", "gpu"])
def test_every_benchmark_runs(mode: str) -> None:
    """At the smallest sizes; the modes for a GPU too, on the CPU: nothing is dead on arrival."""
    environ = {**os.environ, "TRITON_INTERPRET": "1"} if mode == "gpu" else None
    done = subprocess.run(
        [sys.executable, "-c", ALL_TINY, mode], cwd=ROOT, env=environ, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in run.names():
        assert f"ran {name} " in done.stdout
    on_a_gpu = ("attention_gpu", "contrastive", "training_step", "first_call", "trainer")
    if mode == "gpu":
        assert not any(f"ran {name} 0" in done.stdout for name in on_a_gpu)


@pytest.mark.slow
def test_two_commits_are_compared() -> None:
    command = [sys.executable, "-m", "benchmarks.run", "attention", "--tiny", "--base", "HEAD"]
    done = subprocess.run(
        [*command, "--rounds", "2"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| attention"))
    before, now = (float(cell) for cell in row.split("|")[4:6])
    assert before > 0
    assert now > 0
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True)
    assert "/source" not in listed.stdout
