"""Tests that a GPU runs, in Triton's interpreter: those of ops whose other tests need neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from musiclm_fast.ops import _triton_target

pytest.importorskip("triton")


@pytest.mark.skipif(_triton_target.INTERPRET, reason="this run is inside the interpreter already")
@pytest.mark.parametrize("op", ["geglu_norm", "hyper_connection"])
def test_in_the_interpreter(op: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(f"test_{op}.py"))],
        cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
