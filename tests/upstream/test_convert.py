"""``musiclm-fast convert``: upstream's weights, without the model, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from musiclm_fast import MuLaN, cli, from_upstream
from musiclm_fast.interop.convert import config_of_weights
from musiclm_fast.models.configuration import mulan_config
from tests.upstream import live
from tests.upstream.test_parity_mulan import build

MODELS: dict[str, dict[str, Any]] = {
    "usual": {},
    "sigmoid": dict(sigmoid_contrastive_loss=True),
    "hierarchical": dict(hierarchical_contrastive_loss=True),
    "sizes": dict(
        audio=dict(spec_n_fft=256, spec_win_length=200, patch_size=(8, 4)), text=dict(ff_mult=2)
    ),
}


def make(upstream: live.Upstream, name: str) -> Any:
    torch.manual_seed(0)
    return build(upstream.musiclm, **MODELS[name]).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("package", ["trainer", "state_dict"])
def test_convert(
    name: str, package: str, upstream: live.Upstream, tmp_path: Path, capsys: Any
) -> None:
    """The folder's model says what the live one says."""
    theirs = make(upstream, name)
    state = theirs.state_dict()
    torch.save({"model": state, "optim": {}} if package == "trainer" else state, tmp_path / "m.pt")
    argv = ["convert", str(tmp_path / "m.pt"), "-o", str(tmp_path / "out")]
    if name == "sizes":
        argv += ["--set", "audio.spec_n_fft=256", "--set", "audio.patch_size=[8, 4]"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    assert ("audio.spec_n_fft = 128" in said) is (name != "sizes")
    assert "mulan.decoupled_contrastive_learning = True" in said
    model = MuLaN.from_pretrained(tmp_path / "out")
    wanted = from_upstream(theirs)
    wavs, texts = torch.randn(3, 4000), torch.randint(1, 50, (3, 6))
    with torch.no_grad():
        for ours, expected in zip(
            model(wavs, texts, return_latents=True), wanted(wavs, texts, return_latents=True)
        ):
            assert torch.equal(ours, expected)
        assert model(wavs, texts).item() == pytest.approx(theirs(wavs, texts).item(), rel=1e-4)
    found, expected = mulan_config(model), mulan_config(wanted)
    silent = {"patch_dropout_prob", "attn_dropout", "ff_dropout", "spec_hop_length",
              "spec_aug_freq_mask", "spec_aug_time_mask", "spec_aug_stretch_factor"}  # fmt: skip
    if name == "sigmoid":
        silent.add("decoupled_contrastive_learning")
    for kind in ("audio", "text", "mulan"):
        assert {n for n, v in expected[kind].items() if found[kind][n] != v} <= silent


def test_what_shapes_do_not_tell(upstream: live.Upstream, tmp_path: Path, capsys: Any) -> None:
    state = make(upstream, "sizes").state_dict()
    with pytest.raises(ValueError, match=r"audio\.patch_size: got patches of 32 values"):
        config_of_weights(state)
    with pytest.raises(ValueError, match=r"audio\.spec_n_fft: got a window of 200 samples"):
        config_of_weights(state, {"audio": {"patch_size": (8, 4)}})
    torch.save(state, tmp_path / "m.pt")

    def failed(*more: str, file: Path = tmp_path / "m.pt") -> str:
        assert cli.main(["convert", str(file), "-o", str(tmp_path / "out"), *more]) == cli.FAILED
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    fits = ["--set", "audio.spec_n_fft=256", "--set", "audio.patch_size=[8, 4]"]
    assert "does not fit the configuration" in failed(*fits, "--set", "text.dim=12")
    assert "given: got 'sound', expected one of" in failed(*fits, "--set", "sound.dim=12")
    assert "cannot build the model" in failed(*fits, "--set", "audio.wings=2")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    assert "weights: got no audio.spec.window" in failed(file=tmp_path / "other.pt")
    assert "no file" in failed(file=tmp_path / "none.pt")
