"""Device, versions, commit and date: what a table of results must state."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

# Not resolved: `--base` links this folder next to another commit's package.
ROOT = Path(__file__).absolute().parents[2]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:  # not installed
        return ""
    return done.stdout.strip()


def environment() -> dict[str, str]:
    """The facts of this machine, tree and command."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        model = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        device = f"{model[0] if model else platform.processor()}, {torch.get_num_threads()} threads"
    commit = _git("rev-parse", "--short", "HEAD")
    # Results of earlier benchmarks of the run do not change the measured code.
    if _git("diff", "HEAD", "--stat", "--", ".", ":(exclude)benchmarks/results"):
        commit += "-dirty"
    versions = {}
    for name in ("torch", "triton", "musiclm-pytorch", "audiolm-pytorch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": device,
        "python": platform.python_version(),
        **versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }
