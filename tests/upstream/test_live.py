"""Upstream imports from a clean interpreter and leaves no traces."""

from __future__ import annotations

import pytest

from tests.upstream import live

IMPORT_OURS = """
import musiclm_fast
already = "audiolm_pytorch" in sys.modules
Quantizer = musiclm_fast.MuLaNEmbedQuantizer
assert already or "audiolm_pytorch" not in sys.modules, "our import ran all of audiolm's"
"""

IMPORT_THEIRS = """
warn, level = warnings.warn, logging.root.level
from tests.upstream import live
upstream = live.load()

assert warnings.warn is warn, "warnings.warn was replaced"
assert logging.root.level == level, "the root logger's level was changed"
for name in ("fairseq", "torchvision"):
    kept = sys.modules.get(name)
    assert kept is None or kept.__spec__ is not None, f"the stand-in for {name} was left behind"

# a condition's width used to be looked up over the network even when it was given
upstream.audiolm.SemanticTransformer(dim=16, depth=1, heads=1, num_semantic_tokens=4, cond_dim=8)
"""

CHECK = """
from audiolm_pytorch.utils import AudioConditionerBase, curtail_to_multiple
assert upstream.core.AudioConditionerBase is AudioConditionerBase
assert issubclass(Quantizer, AudioConditionerBase)
print(upstream.musiclm.MuLaN.__module__, upstream.tokenizer.vocab_size)
"""


@pytest.mark.parametrize(
    "order", [(IMPORT_OURS, IMPORT_THEIRS), (IMPORT_THEIRS, IMPORT_OURS)], ids=["ours", "theirs"]
)
def test_clean_interpreter_that_imports_first(order: tuple[str, str]):
    printed = live.run_script("import logging, sys, warnings\n" + "".join(order) + CHECK)
    assert printed.split() == ["musiclm_pytorch.musiclm_pytorch", "49408"]


def test_absent_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "_REQUIRED", ("torch", "no_such_package"))
    with pytest.raises(live.UpstreamMissing, match="needs no_such_package, not installed"):
        live.load.__wrapped__()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "VERSIONS", {"musiclm-pytorch": "0.0.1"})
    with pytest.raises(live.UpstreamMissing, match=r"musiclm-pytorch 0\.0\.1, found 0\.2\.8"):
        live.load.__wrapped__()
