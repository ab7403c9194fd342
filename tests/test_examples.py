"""Every example runs as its reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "joint_embedding.py": "conditioning (2, 8, 1024)",
    "old_script.py": "musiclm_fast.models.mulan loss",
    "train_on_your_data.py": "training complete",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example):
    run = subprocess.run(
        [sys.executable, str(example)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert SAYS[example.name] in run.stdout + run.stderr
