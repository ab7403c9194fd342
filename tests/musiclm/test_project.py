"""A whole small MusicLM: fitted, trained, opened again and asked from the command line."""

import pytest
import torch

from musiclm_fast import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_fast.audio.writing import write_wave
from musiclm_fast.cli import main
from musiclm_fast.models.checkpoint import CheckpointError, save_checkpoint
from musiclm_fast.musiclm.project import MusicConfig, MusicProject
from tests.audiolm.test_tokenizers import RATE, notes

soundfile = pytest.importorskip("soundfile")
SMALL = MusicConfig(
    dim=32, depth=1, heads=2, semantic_tokens=12, codebook_size=10, condition_quantizers=2,
    condition_codes=6,
)  # fmt: skip


def make_mulan():
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=1, heads=2, dim_head=16)
    return MuLaN(
        AudioSpectrogramTransformer(**sizes, front_end="mulan"), TextTransformer(**sizes), 16
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("music")
    clips = notes(8, 0.5)
    project = MusicProject(folder, make_mulan(), SMALL)
    project.fit(clips, RATE, progress=False)
    for name in ("semantic", "coarse", "fine"):
        project.train(name, clips, RATE, 3, 4, accelerate_kwargs={"cpu": True})
    # Models of three steps may end a piece at once: these seldom do.
    for name, key in (("semantic", "to_logits.bias"), ("coarse", "coarse_logit_weights")):
        package = torch.load(folder / f"{name}.pt", weights_only=True)
        package["model"][key][..., -1] = -1e9 if key.endswith("bias") else 0.0
        torch.save(package, folder / f"{name}.pt")
    return folder


def test_an_opened_project_is_the_same(folder):
    first, second = (MusicProject(folder).musiclm() for _ in range(2))
    options = dict(seconds=0.3, seed=1, progress=False, return_all=True)
    for a, b in zip(first("a flute", 2, **options), second("a flute", 2, **options), strict=True):
        assert a.score == b.score
        assert (a.wave is None and b.wave is None) or torch.equal(a.wave, b.wave)


def test_the_command_line_generates(folder, tmp_path, capsys):
    output = tmp_path / "out" / "flute.wav"
    command = ["generate", "a flute", "--seconds", "0.3", "--num-samples", "3", "--all"]
    assert main([*command, "--seed", "2", "--music", str(folder), "-o", str(output)]) == 0
    out, _ = capsys.readouterr()
    assert out.count("similarity to the text") == 3
    samples, rate = soundfile.read(output)
    assert rate == RATE
    assert 0 < len(samples) <= 0.31 * RATE


def test_texts_that_say_nothing_or_too_much(folder):
    musiclm = MusicProject(folder).musiclm()
    for text in ("a flute " * 300, " ", "&#32;"):
        with pytest.raises(ValueError, match="text: got"):
            musiclm(text, seconds=0.3, progress=False)
    with pytest.raises(TypeError, match="text"):
        musiclm(["a flute"], seconds=0.3, progress=False)


def test_the_command_line_streams(folder, tmp_path, capsys):
    output = tmp_path / "long.wav"
    command = ["generate", "a flute", "--seconds", "0.6", "--music", str(folder), "--seed", "3"]
    assert main([*command, "--window-seconds", "0.2", "-o", str(output)]) == 0
    out, _ = capsys.readouterr()
    samples, _ = soundfile.read(output)
    assert 0 < len(samples) <= 0.6 * RATE
    assert out == f"{output}: {len(samples) / RATE:.2f} s\n"
    for wrong in (["--window-seconds", "0"], ["--window-seconds", "1", "--num-samples", "2"]):
        assert main([*command, *wrong, "-o", str(output)]) == 2
        assert wrong[-2][2:] in capsys.readouterr().err


def test_the_command_line_trains(tmp_path, capsys):
    sounds = tmp_path / "sounds"
    for index, clip in enumerate(notes(6, 0.5)):
        write_wave(sounds / f"{index}.wav", clip, RATE)
    save_checkpoint(tmp_path / "mulan.pt", make_mulan())
    command = ["train", "fine", str(sounds), "--checkpoint", str(tmp_path / "mulan.pt")]
    command += ["--output", str(tmp_path / "out"), "--steps", "1", "--batch-size", "2"]
    assert main([*command, "--seconds", "0.2"]) == 0
    assert "fine: loss" in capsys.readouterr().out
    assert main([*command, "--seconds", "0.2"]) == 0  # nothing is left to do
    assert "after 1 step," in capsys.readouterr().out
    assert main([*command, "--seconds", "0.2", "--steps", "2"]) == 2
    assert "training.steps = 1, not 2" in capsys.readouterr().err
    assert main([*command, "--seconds", "0.2", "--set", "music.dim=64"]) == 2
    assert "music: " in (error := capsys.readouterr().err)
    assert "dim = 256, not 64" in error
    assert main([*command, "--seconds", "0.2", "--steps", "2", "--restart"]) == 0
    assert "after 2 steps" in capsys.readouterr().out
    assert (tmp_path / "out" / "fine.pt").is_file()
    assert main(["generate", "a flute", "--music", str(tmp_path / "out")]) == 2
    assert "train the semantic stage first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", " "], "text"),
        (["generate", "a flute", "--seconds", "0"], "seconds"),
        (["generate", "a flute", "--num-samples", "0"], "num-samples"),
        (["generate", "a flute", "--music", "absent"], "no file"),
        (["train", "coarse", "absent"], "no folder"),
    ],
)
def test_bad_commands(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_project(tmp_path):
    torch.save({"config": {}}, tmp_path / "parts.pt")
    with pytest.raises(CheckpointError):
        MusicProject(tmp_path)
    with pytest.raises(ValueError, match="ended at once"):
        write_wave(tmp_path / "x.wav", None, RATE)
