"""The command for a GPU at hand: its survey, its stages' processes, its tables, and a dry run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.harness import ROOT
from benchmarks.harvest import __main__ as harvest
from benchmarks.harvest import cases, checks, kernels, measuring, models, summary
from benchmarks.harvest import survey as surveying
from benchmarks.harvest.measuring import Row, Stage
from musiclm_fast._dispatch import BackendError
from musiclm_fast.models import front_end

needs_triton = pytest.mark.skipif(surveying.no_triton() != "", reason="triton is not installed")
no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def run_harvest(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.harvest", *arguments], cwd=ROOT,
        env={**os.environ, **environ}, capture_output=True, text=True,
    )  # fmt: skip


# ---- bad input and poor machines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "card,nope"], "--stages: got nope, expected some of card, library, parity"),
        (["--deadline", "0"], "--deadline: got 0, expected seconds above 0"),
        (["--output", "/dev/null/x"], "--output: /dev/null/x cannot be written"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        harvest.parse(["--output", str(tmp_path), *arguments])
    assert words in capsys.readouterr().err


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert surveying.no_space(tmp_path) == ""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: argparse.Namespace(free=surveying.SPACE - 1)
    )
    assert "511 MiB free, of 512" in surveying.no_space(tmp_path)


@no_gpu_here
def test_without_a_gpu_it_says_what_can_be_run(tmp_path: Path) -> None:
    done = run_harvest("--output", str(tmp_path))
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 python -m benchmarks.harvest --tiny" in done.stderr
    assert done.stderr.startswith(f"{surveying.no_gpu()}.")


def test_no_gpu_gives_torch_s_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in surveying.no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def old_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "init", old_driver)
    monkeypatch.setattr(surveying, "driver_version", lambda: "470.57.02")
    text = surveying.no_gpu()
    assert "finds no usable GPU (driver 470.57.02): The NVIDIA driver" in text
    assert "found version 11040" in text


def fake_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    properties = argparse.Namespace(
        name="Card", major=major, minor=minor, multi_processor_count=80, total_memory=2**34
    )
    monkeypatch.setattr(surveying, "no_gpu", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@needs_triton
def test_an_old_gpu_leaves_out_the_stages_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, 7, 5)
    found = surveying.survey()
    assert found.device.startswith("Card, compute capability 7.5, 80 multiprocessors, 16 GiB")
    assert set(found.left_out) == set(surveying.TRITON)
    assert "7.5 is below 8.0" in found.left_out["attention"]
    fake_gpu(monkeypatch, 9, 0)
    assert surveying.survey().left_out == {}


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_gpu(monkeypatch, 9, 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(
        surveying._extension, "extension_status",
        lambda: argparse.Namespace(facts={"cuda_archs": []}),
    )  # fmt: skip
    remarks = "\n".join(surveying.survey().remarks)
    for words in (
        "cannot be built: no nvcc, cmake, ninja; the spectrogram's kernels are then left out",
        "no ncu: stage counters", "no compute-sanitizer: stage sanitizer",
    ):  # fmt: skip
        assert words in remarks
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if surveying.importlib.util.find_spec("triton"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        assert "no C compiler" in surveying.no_triton()
        (tmp_path / "KEY").mkdir()
        (tmp_path / "KEY" / "__triton_launcher.so").touch()
        assert surveying.no_triton() == ""


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["80-real", "90"], 90, True),
        (["80-real", "90"], 100, True),  # by its PTX
        (["80-real"], 86, True),
        (["80-real"], 90, False),
        (["90a-real"], 90, True),
        (["90a"], 100, False),
        (["90-virtual"], 89, False),
        (["90-real"], 103, False),
        ([], 90, False),
    ],
)
def test_which_gpus_a_library_runs_on(archs: list[str], capability: int, runs: bool) -> None:
    assert checks.runs_on(archs, capability) is runs


# ---- stages as processes


def test_a_stage_at_its_deadline_keeps_its_rows(tmp_path: Path) -> None:
    found = harvest.run_stage("card", tmp_path, tiny=True, limit=0.2)
    assert found["problem"] == "cut off after 0 s"
    assert found["seconds"] < 10
    (tmp_path / "stage-card.json").write_text(json.dumps([vars(Row("a", "b", 1.0))]))
    assert harvest.rows_of("card", tmp_path)["rows"][0]["case"] == "a"


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(0.5)
    harvest.end(process)
    assert process.returncode == -signal.SIGKILL


def test_a_stage_that_lost_cuda_goes_on_in_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases.Case("made-up", "case", ("ours", "flash", "cuDNN"))

    def body(resume: bool) -> list[str]:
        stage = Stage(tmp_path, "made-up", True, resume)
        ran = []
        for contender in stage.contenders(case):
            with stage.attempt(case.name, contender, optional=True):
                stage.gpu = contender == "flash"
                ran.append(contender)
                assert contender != "flash", "an illegal memory access"
                stage.note(case.name, "fine", contender)
        return ran

    monkeypatch.setattr(measuring, "_lost", lambda: True)
    monkeypatch.setattr(measuring.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        body(resume=False)
    assert ended.value.code == measuring.LOST
    assert body(resume=True) == ["cuDNN"]
    rows = harvest.rows_of("made-up", tmp_path)["rows"]
    notes = [(row["contender"], row["note"].splitlines()[0][:40]) for row in rows]
    assert [who for who, _ in notes] == ["ours", "flash", "cuDNN"]
    assert "an illegal memory access" in notes[1][1]
    # and the parent starts it again
    said = [f"exit {measuring.LOST}: ", f"exit {measuring.LOST}: ", ""]
    commands: list[list[str]] = []
    monkeypatch.setattr(
        harvest, "run_worker", lambda command, *_: commands.append(command) or said.pop(0)
    )
    assert harvest.run_stage("card", tmp_path, True, 60)["problem"] == ""
    assert ["--resume" in command for command in commands] == [False, True, True]


def test_what_a_stage_leaves_running_is_ended(tmp_path: Path) -> None:
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE
    )
    left = int(process.communicate()[0])
    harvest.end(process)
    state = Path(f"/proc/{left}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def test_a_worker_with_a_failed_row_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(harvest.WORKERS, "small_calls", lambda stage: stage.fail("case", "wrong"))
    assert harvest.work("small_calls", tmp_path, tiny=True) == 1
    monkeypatch.setitem(harvest.WORKERS, "small_calls", lambda stage: stage.note("case", "fine"))
    assert harvest.work("small_calls", tmp_path, tiny=True) == 0


def test_an_interrupted_run_keeps_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage(name: str, output: Path, tiny: bool, limit: float) -> dict[str, Any]:
        rows = [vars(Row(f"case of {name}", "ours", 1.0))]
        if name == "parity":
            (output / "stage-parity.json").write_text(json.dumps(rows))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return {"rows": rows, "problem": "", "seconds": 1.0}

    monkeypatch.setattr(harvest, "run_stage", stage)
    args = harvest.parse(["--output", str(tmp_path), "--stages", "card,attention,parity,bits"])
    here = surveying.Survey(device="Card", left_out={"attention": "no Triton"})
    found = harvest.collect(args, here, time.perf_counter())
    saved = json.loads((tmp_path / "harvest.json").read_text())["stages"]
    assert saved == found
    assert list(saved) == ["card", "attention", "parity"]
    assert saved["attention"]["left_out"] == "no Triton"
    assert saved["parity"]["problem"] == "interrupted"
    assert saved["parity"]["rows"][0]["case"] == "case of parity"
    assert "case of card" in (tmp_path / "harvest.md").read_text()
    args.deadline = 1.0
    late = harvest.collect(args, here, time.perf_counter())
    assert late["card"]["problem"] == "not started: no time left"


def test_what_raises_is_a_row_and_the_stage_goes_on(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "made-up", tiny=True)
    for optional in (False, True):
        with stage.attempt("case", "name", optional=optional):
            raise ValueError("no\n  good")
    with stage.attempt("case", "ours"):
        raise BackendError("too wide")
    stage.time(cases.Case("made-up", "case", ("ours",), operations=1e9), "ours", lambda: None)
    saved = json.loads((tmp_path / "stage-made-up.json").read_text())
    assert [row["failed"] for row in saved] == ["ValueError: no good", "", "", ""]
    assert [row["note"] for row in saved[1:3]] == ["ValueError: no good", "BackendError: too wide"]
    assert saved[3]["tflops"] == pytest.approx(1e-3 / (saved[3]["ms"] / 1e3))
    assert torch.cuda.is_available() or "dry run" in saved[3]["note"]


# ---- tables


def test_counters_are_read_from_ncu_s_csv() -> None:
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","forward_kernel","gpu__time_duration.sum","ns","1,234"\n'
        '"0","forward_kernel","launch__registers_per_thread","","128"\n'
        '"1","backward_kernel","smsp__issue_active.avg.pct_of_peak_sustained_active","%","61"\n'
        '"1","backward_kernel","something else","%","1"\n'
    )
    assert kernels.counted(text) == [
        ("forward_kernel", "ns 1,234, registers 128"),
        ("backward_kernel", "issue % 61"),
    ]


def test_ncu_is_told_our_kernels_and_none_of_torch() -> None:
    texts = [path.read_text() for path in ROOT.glob("musiclm_fast/ops/*/_triton_kernels.py")]
    texts += [path.read_text() for path in ROOT.glob("csrc/*/*.cu")]
    found = re.findall(r"^def (\w+_kernel)\(|(\w+_kernel)\(Call", "\n".join(texts), re.MULTILINE)
    ours = {first or second for first, second in found}
    assert {"backward_kv_kernel", "sigmoid_kernel", "forward_fixed_kernel"} <= ours
    assert [name for name in ours if not re.search(kernels.OUR_KERNELS, name)] == []
    for name in ("vectorized_elementwise_kernel", "index_elementwise_kernel", "reduce_kernel"):
        assert not re.search(kernels.OUR_KERNELS, name)


def test_a_counter_that_ncu_does_not_know_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(
        "#!/bin/sh\n"
        'case "$*" in *stalled_gmma*) echo '
        "'==ERROR== no metric smsp__average_warps_issue_stalled_gmma_per_issue_active';; *)\n"
        """echo '"ID","Kernel Name","Metric Name","Metric Value"'\n"""
        """echo '"0","kernel","launch__registers_per_thread","128"';; esac\n"""
    )
    ncu.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(ncu))
    stage = Stage(tmp_path, "counters", tiny=True)
    stage.gpu = True
    kernels.counters(stage)
    assert [row.case for row in stage.rows] == ["ncu", "kernel"]
    assert "stalled_gmma" in stage.rows[0].note
    assert stage.rows[1].note == "registers 128"


def test_the_short_table(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.attention(False)[0]
    copy, product, _ = cases.card(False)
    rows = {
        "card": [Row(product.name, "torch", 1.6, tflops=700.0), Row(copy.name, "torch", gbs=3e3)],
        "bits": [Row("attention", "ours", note="0 of 199 runs gave other bits")],
        "parity": [Row("tests/ops/test_attention.py", failed="1 failed")],
        "attention": [
            Row(case.name, cases.SHARED, 0.30, kernels_ms=0.2, graph_ms=0.21, tflops=210.0),
            Row(case.name, cases.FLASH, 0.16, kernels_ms=0.15, tflops=300.0),
        ],
    }
    found = {
        name: {"rows": [vars(row) for row in stage], "problem": "", "seconds": 3.0}
        for name, stage in rows.items()
    }
    guess = argparse.Namespace(ms=0.5, kernels_ms=0.25)
    monkeypatch.setattr(summary.predict, "load", lambda device: {(case.name, cases.SHARED): guess})
    text = summary.text(found, "Card")
    lines = text.splitlines()
    assert "== parity: 3 s, 1 wrong; first: tests/ops/test_attention.py : 1 failed" in lines
    ours = lines[lines.index(case.name) + 1].split("  ")
    cells = [cell.strip() for cell in ours if cell.strip()]
    assert cells == [
        "ours, shared", "0.3", "0.2", "0.21", "210 TF/s", "30%", "0.25", "x 0.80", "wrong",
        "flash 0.75",
    ]  # fmt: skip
    markdown = summary.markdown(found, "Card")
    assert f"| {case.name} | flash | 0.16 | 0.15 |" in markdown
    assert "**1 failed**" in markdown


# ---- every line of it


@needs_triton
@no_gpu_here
@pytest.mark.slow
@pytest.mark.upstream
def test_dry_run(tmp_path: Path) -> None:
    done = run_harvest("--tiny", "--deadline", "3000", "--output", str(tmp_path),
                       TRITON_INTERPRET="1")  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    saved = json.loads((tmp_path / "harvest.json").read_text())["stages"]
    assert list(saved) == list(harvest.STAGES)
    rows = [Row(**row) for stage in saved.values() for row in stage["rows"]]
    timed = {(row.case, row.contender) for row in rows if row.ms}
    wanted = {(c.name, who) for c in cases.all_cases(tiny=True) for who in c.contenders}
    others = {(c.name, who) for c in cases.peers(True) for who in c.contenders}
    # FlexAttention has no backward on a CPU.
    assert wanted - timed - others == {(cases.attention(True, "flex")[1].name, cases.FLEX)}
    reasons = {(row.case, row.contender): row.note for row in rows if not row.ms}
    assert all(reasons[who] for who in others - timed)
    assert timed <= wanted
    text = (tmp_path / "summary.txt").read_text()
    assert all(case.name in text for case in cases.all_cases(tiny=True))
    assert any("tests/ops" in row.case and "passed" in row.note for row in rows)


@needs_triton
@pytest.mark.slow
@pytest.mark.aot
def test_kernels_made_ahead_of_time_are_found_again(tmp_path: Path) -> None:
    note = (
        "from benchmarks.harvest import triton_cache as t\n"
        "from musiclm_fast import testing\n"
        "from musiclm_fast.ops import attention\n"
        "import torch\n"
        "with t.noted():\n"
        "    inputs = testing.attention_inputs(dtype=torch.bfloat16)\n"
        "    out = attention(**inputs, backend='triton')\n"
        "    testing.gradients(out, inputs, torch.ones_like(out))\n"
    )
    compile_ = (
        "import pathlib, pickle, sys\n"
        "from benchmarks.harvest import triton_cache as t\n"
        "paths = pathlib.Path(sys.argv[1]).glob('*.pickle')\n"
        "launches = [x for path in paths for x in pickle.loads(path.read_bytes())]\n"
        "made, failed = t.compile_noted(launches, 'sm_90')\n"
        "print(len(made), failed)\n"
    )
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}

    def run(code: str, **more: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env={**environ, **more},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    run(note, TRITON_INTERPRET="1", MUSICLM_FAST_NOTED_LAUNCHES=str(tmp_path))
    count, failed = map(int, run(compile_).split())
    assert count >= 4 and failed == 0
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(kept) == count
    run(compile_)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == kept


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events, streams and graphs replaced by ones that do nothing, so that the lines for a
    GPU run here."""

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def elapsed_time(self, other: Event) -> float:
            return 3.0

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    class Graph:
        def replay(self) -> None: ...

    @contextlib.contextmanager
    def block(*_: Any, **__: Any) -> Any:
        yield

    stand_ins: dict[str, Any] = dict(
        Event=Event, Stream=Stream, CUDAGraph=Graph, stream=block, graph=block,
        current_stream=Stream, synchronize=lambda: None, empty_cache=lambda: None,
        reset_peak_memory_stats=lambda: None, memory_allocated=lambda: 5,
        max_memory_allocated=lambda: 12, set_sync_debug_mode=lambda mode: None,
        current_device=lambda: 0, graph_pool_handle=lambda: (0, 7),
        default_generators=[mock.Mock(**{"clone_state.return_value": "before"})],
    )  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    table = [("long_kernel", 0.5, 1.0), ("short_kernel", 0.25, 3.0)]
    for module in (measuring, kernels, models):
        monkeypatch.setattr(module, "kernel_table", lambda run, calls=3, trace=None: table)
    monkeypatch.setattr(models, "_kernels", lambda gpu: contextlib.nullcontext())


def test_the_lines_for_a_gpu(pretended_gpu: None, tmp_path: Path) -> None:
    stage = Stage(tmp_path, "made-up", tiny=True)
    stage.gpu = True
    case = cases.Case("made-up", "case", ("ours",), operations=1.5e9)
    with measuring.own_stream(True):
        row = stage.time(case, "ours", lambda: None, memory=True)
    assert (row.ms, row.least, row.kernels_ms, row.launches) == (3.0, 3.0, 0.75, 4)
    assert row.graph_ms == 3.0 / 20
    assert row.memory == 7
    assert row.tflops == pytest.approx(2.0)

    models.step_captured(stage)
    kernels.note_kernels(stage, "case", "ours", lambda: None)
    assert stage.rows[-1].note.startswith("long_kernel 0.500 ms x 1; short_kernel 0.250 ms x 3")
    assert not any(row.failed for row in stage.rows)


def test_the_captured_step_copies_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = mock.Mock(side_effect=front_end.draw_span)
    monkeypatch.setattr(front_end, "draw_span", drawn)
    models._capturable(cases.steps(True, "step_captured")[0], "cpu")()
    assert drawn.call_count == 2
    assert all(call.args[2] is not None for call in drawn.call_args_list)  # one a sample


def test_a_failed_capture_is_mended_and_the_row_kept(
    pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def spoiled(*_: Any, **__: Any) -> Any:
        try:
            yield
        except ValueError:
            raise RuntimeError("the capture was spoiled")  # noqa: B904

    released = mock.Mock()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, getattr(released, name), raising=False)
    monkeypatch.setattr(torch.cuda, "graph", spoiled)
    capturing = mock.Mock(side_effect=[None] * 9 + [ValueError("this waits")])
    stage = Stage(tmp_path, "made-up", tiny=True)
    stage.gpu = True
    case = cases.Case("made-up", "case", ("ours",))
    row = stage.time(dataclasses.replace(case, budget=0.0), "ours", capturing)
    assert (row.ms, row.kernels_ms, row.note) == (3.0, 0.75, "no graph: this waits")
    torch.cuda.default_generators[0].graphsafe_set_state.assert_called_once_with("before")
    assert [call[0] for call in released.mock_calls] == [
        "_cuda_endAllocateToPool", "_cuda_releasePool"
    ]  # fmt: skip
    assert all(call.args == (0, (0, 7)) for call in released.mock_calls)


def test_a_trace_that_is_too_large_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.json"
    for limit, kept in ((1000, True), (10, False)):
        trace.write_text("{}" * 100)
        monkeypatch.setattr(models, "TRACE_BYTES", limit)
        models.compress(trace)
        assert not trace.exists()
        assert (tmp_path / "trace.json.gz").exists() is kept
