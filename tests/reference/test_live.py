"""The live reference imports from a clean interpreter and leaves no traces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import live

ROOT = Path(__file__).parents[2]

CLEAN_IMPORT = """
import logging, sys, warnings
warn, level = warnings.warn, logging.root.level
from tests.reference import live
reference = live.load()

assert warnings.warn is warn, "warnings.warn was replaced"
assert logging.root.level == level, "the root logger's level was changed"
for name in ("fairseq", "torchvision"):
    kept = sys.modules.get(name)
    assert kept is None or kept.__spec__ is not None, f"the stand-in for {name} was left behind"

# a condition's width used to be looked up over the network even when it was given
reference.audiolm.SemanticTransformer(dim=16, depth=1, heads=1, num_semantic_tokens=4, cond_dim=8)
print(reference.musiclm.MuLaN.__module__, reference.tokenizer.vocab_size)
"""


@pytest.mark.usefixtures("reference")
def test_imports_from_a_clean_interpreter():
    command = [sys.executable, "-c", CLEAN_IMPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["musiclm_pytorch.musiclm_pytorch", "49408"]


def test_absent_packages_are_named(monkeypatch):
    monkeypatch.setattr(live, "_REQUIRED", ("torch", "no_such_package"))
    with pytest.raises(live.ReferenceMissing, match="needs no_such_package, not installed"):
        live.load.__wrapped__()


@pytest.mark.usefixtures("reference")
def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(live, "VERSIONS", {"musiclm-pytorch": "0.0.1"})
    with pytest.raises(live.ReferenceMissing, match=r"musiclm-pytorch 0\.0\.1, found 0\.2\.8"):
        live.load.__wrapped__()
