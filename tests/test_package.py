"""The package as installed: what importing costs, what the wheel holds, how the tree is laid."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(
    folder.name
    for folder in (ROOT / "musiclm_fast" / "ops").iterdir()
    if folder.is_dir() and not folder.name.startswith(("_", "."))
)

IMPORT_SECONDS = 0.3  # of processor time on top of `import torch`
NOT_ON_IMPORT = (
    "accelerate",
    "audiolm_pytorch",
    "fairseq",
    "matplotlib",
    "musiclm_pytorch",
    "sklearn",
    "torchaudio",
    "torchvision",
    "transformers",
    "triton",
    "wandb",
)


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run code in a fresh interpreter that finds the package in ``cwd``; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap() -> None:
    """Importing, and reaching for the first model, which imports the ops."""
    # Processor time: an import waits for nothing, and the clock would count other processes.
    code = (
        "import time, torch; start = time.process_time(); "
        "import musiclm_fast; musiclm_fast.MuLaN; print(time.process_time() - start)"
    )
    python(code)  # the first run writes the bytecode
    seconds = statistics.median(float(python(code)) for _ in range(3))
    assert seconds <= IMPORT_SECONDS


def test_import_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import musiclm_fast; musiclm_fast.MuLaN; "
        "print(*set(sys.modules) - before)"
    )
    imported = set(python(code).split())
    assert "musiclm_fast.ops.attention" in imported
    assert "torch._dynamo" not in imported
    assert {name.split(".")[0] for name in imported}.isdisjoint(NOT_ON_IMPORT)


def test_there_are_ops() -> None:
    assert {"attention", "contrastive", "spectrogram"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_layout(op: str) -> None:
    """Every op has its contract, its reference, its test and its benchmark, by the same stem."""
    folder = ROOT / "musiclm_fast" / "ops" / op
    assert (folder / "op.py").is_file()
    assert (folder / "reference.py").is_file()
    assert list((ROOT / "tests" / "ops").glob(f"test_{op}*.py"))
    assert list((ROOT / "benchmarks").glob(f"bench_{op}*.py"))


def test_csrc_folders_are_ops() -> None:
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common"}
    assert folders <= set(OPS)


def source_copy(target: Path) -> Path:
    """A copy of what a clone holds, so that a build leaves nothing in the checkout."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    target.mkdir()
    for name in ("musiclm_fast", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    return target


def build_wheel(source: Path, **environment: str) -> Path:
    out = source / "dist"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def python_files() -> set[str]:
    files = (ROOT / "musiclm_fast").rglob("*.py")
    return {str(file.relative_to(ROOT)) for file in files}


def test_pure_wheel(tmp_path: Path) -> None:
    wheel = build_wheel(source_copy(tmp_path / "source"), MUSICLM_FAST_BUILD="0")
    assert re.fullmatch(r"musiclm_fast-[\d.]+-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert python_files() <= names
    data = (ROOT / "musiclm_fast" / "data").iterdir()
    assert {f"musiclm_fast/data/{file.name}" for file in data} <= names
    assert "musiclm_fast/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "musiclm-fast = musiclm_fast.cli:main" in entry_points
    assert "License-Expression: MIT" in text
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    core = {re.split(r"[ <>=!~;\[]", line)[1] for line in required if "extra ==" not in line}
    assert core.isdisjoint({"fairseq", "torchaudio", "torchvision", "transformers"})
    extras = set(re.findall(r"^Provides-Extra: (\w+)", text, re.MULTILINE))
    assert {"train", "audiolm", "bench", "demo", "dev"} <= extras


@pytest.mark.slow
def test_compiled_wheel(tmp_path: Path) -> None:
    """The wheel with the compiled library is for every Python and works where it is unpacked."""
    source = source_copy(tmp_path / "source")
    wheel = build_wheel(source, MUSICLM_FAST_BUILD="1", MUSICLM_FAST_CUDA="0")
    assert re.fullmatch(r"musiclm_fast-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    code = (
        "from musiclm_fast import _extension as e; "
        "print(e.__file__, e.load(), e.extension_status().facts['cuda_archs'], e.why_missing())"
    )
    assert python(code, cwd=unpacked) == f"{unpacked}/musiclm_fast/_extension.py True []"


def test_build_switches_are_checked(tmp_path: Path) -> None:
    source = source_copy(tmp_path / "source")
    for switch in ("MUSICLM_FAST_BUILD", "MUSICLM_FAST_CUDA"):
        done = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=source,
            env={**os.environ, switch: "yes"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert f"{switch}: got 'yes', expected one of auto, 0, 1" in done.stderr
