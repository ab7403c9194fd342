"""The README's code runs as it stands, with smaller sizes put in by name."""

import re
from pathlib import Path

import pytest
import torch

from tests.audiolm.test_tokenizers import RATE, notes

soundfile = pytest.importorskip("soundfile")
README = Path(__file__).resolve().parent.parent / "README.md"
SMALLER = {
    "dim=512, depth=6, heads=8, dim_head=64": "dim=32, depth=1, heads=2, dim_head=16",
    "(1024, 1024, 1024)": "(32, 32, 32)",
    "dim=1024, depth=6": "dim=32, depth=1, heads=2",
    "num_train_steps=10_000": "num_train_steps=2, accelerate_kwargs={'cpu': True}",
    "seconds=10)": "seconds=0.3, seed=0)",
}


def test_the_whole_usage(tmp_path, monkeypatch, capsys):
    use = README.read_text().split("\n## Use\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", use, re.DOTALL | re.MULTILINE)
    code = "\n".join(block for block in blocks if "install_as_musiclm_pytorch" not in block)
    for large, small in SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    (tmp_path / "sounds").mkdir()
    for index, clip in enumerate(notes(8, 0.7)):
        soundfile.write(tmp_path / "sounds" / f"{index}.wav", clip.numpy(), RATE)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["conds"].shape == (2, 8, 32)
    assert torch.isfinite(names["loss"])
    music = names["music"]
    assert music.ndim == 2
    assert 0 < music.shape[1] <= 0.31 * RATE
    own = names["quantizer"].fingerprint()
    for stage in ("semantic", "coarse", "fine"):
        assert names[stage].conditioner_fingerprint == own
