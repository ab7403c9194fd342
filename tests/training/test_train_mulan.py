"""``musiclm-fast train mulan`` on generated sound files: trains, resumes, refuses clearly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musiclm_fast import MuLaN, cli
from musiclm_fast._checkpoint import read_checkpoint
from musiclm_fast._config import read_config
from musiclm_fast.models.checkpoint import load_mulan
from musiclm_fast.training.mulan import MuLaNTrainer
from musiclm_fast.training.mulan_config import TrainMuLaNConfig

soundfile = pytest.importorskip("soundfile", reason="needs the train extra")
pytest.importorskip("soxr", reason="needs the train extra")
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "train_mulan.yaml"
FILES = 24


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """Tones of 0.6 s as wav files with a table of captions; one file is not sound."""
    folder = tmp_path_factory.mktemp("music")
    lines = ["path,caption"]
    for i in range(FILES):
        time = np.arange(9600) / 16000
        name = f"tone {i}.wav"
        soundfile.write(folder / name, 0.3 * np.sin(2 * np.pi * (200 + 100 * i) * time), 16000)
        lines.append(f"{name},a tone of {200 + 100 * i} Hz")
    (folder / "tone 3.wav").write_bytes(b"no sound at all")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder / "captions.csv"


def arguments(music: Path, output: Path, **changes: Any) -> list[str]:
    """The committed example, made tiny."""
    fields = {
        "data.source": str(music), "data.clip_seconds": 0.5, "data.num_workers": 0,
        "training.output": str(output), "training.steps": 6, "training.batch_size": 4,
        "training.save_every": 2, "schedule.warmup_steps": 2,
        "model.audio": "{dim: 16, depth: 1, heads: 2, dim_head: 8}",
        "model.text": "{dim: 16, depth: 1, heads: 2, dim_head: 8, max_tokens: 16}",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    sets = [f"{name}={value}" for name, value in fields.items()]
    return ["train", "mulan", "--config", str(EXAMPLE), *(x for s in sets for x in ("--set", s))]


def steps(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("mulan.*"))


def test_the_example_trains(music: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(arguments(music, tmp_path / "out")) == 0
    out, _ = capsys.readouterr()
    assert "training complete" in out
    assert "stays at a loss of 1.10" in out  # ln(3)
    assert "1 sound could not be read:\n  tone 3.wav" in out
    assert "the model is in" in out
    model, extra = load_mulan(tmp_path / "out" / "latest")
    assert extra == {"clip_seconds": 0.5, "sample_rate": 16000}
    assert model.audio.front_end.n_mels == 64
    assert {"mulan.4", "mulan.6"} <= set(steps(tmp_path / "out"))
    assert (
        "mulan.2" not in steps(tmp_path / "out") or os.readlink(tmp_path / "out/best") == "mulan.2"
    )
    lines = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "valid_recall@10" in line} == {2, 4, 6}
    file = tmp_path / "out" / "config.yaml"
    assert read_config(TrainMuLaNConfig, file).training.steps == 6


def test_similarity_takes_the_folder(music: Path, tmp_path: Path, capsys: Any) -> None:
    cli.main(arguments(music, tmp_path / "out", training__steps=1))
    capsys.readouterr()
    sound = str(music.parent / "tone 5.wav")
    argv = [
        "similarity",
        sound,
        "a tone",
        "--checkpoint",
        str(tmp_path / "out" / "latest"),
        "--json",
    ]
    assert cli.main(argv) == 0
    assert list(json.loads(capsys.readouterr().out)["similarity"]) == ["a tone"]


def test_goes_on_where_it_was_stopped(
    music: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command after Ctrl-C: the weights of a run that was never stopped."""
    assert cli.main(arguments(music, tmp_path / "whole")) == 0
    step = MuLaNTrainer._optimizer_step

    def interrupted(self: MuLaNTrainer) -> Any:
        values = step(self)
        if self.step == 3:
            os.kill(os.getpid(), 2)
        return values

    monkeypatch.setattr(MuLaNTrainer, "_optimizer_step", interrupted)
    assert cli.main(arguments(music, tmp_path / "parts")) == cli.INTERRUPTED
    assert "the same command resumes the run" in capsys.readouterr().err
    assert "mulan.3" in steps(tmp_path / "parts")
    monkeypatch.undo()
    assert cli.main([*arguments(music, tmp_path / "parts"), "--resume"]) == 0
    assert "resuming at step 3 of 6" in capsys.readouterr().out
    whole, parts = (MuLaN.from_pretrained(tmp_path / run / "latest") for run in ("whole", "parts"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def failed(argv: list[str], capsys: Any) -> str:
    capsys.readouterr()
    assert cli.main(argv) == cli.FAILED
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    return err


def test_another_configuration_is_refused(music: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert cli.main(arguments(music, output, training__steps=2)) == 0
    said = failed(arguments(music, output, training__steps=4, optimizer__learning_rate=1), capsys)
    assert "optimizer.learning_rate = 0.001, not 1.0; training.steps = 2, not 4" in said
    assert "another training.output, or --restart" in said
    assert steps(output) == ["mulan.2"]
    (output / "notes.txt").touch()
    other = dict(training__steps=3, training__save_every=10, training__log_every=1)
    assert cli.main([*arguments(music, output, **other), "--restart"]) == 0
    assert steps(output) == ["mulan.3"]
    assert (output / "notes.txt").is_file()
    assert cli.main(arguments(music, output, **other | dict(training__log_every=5))) == 0
    (output / "config.yaml").write_text("what: 3\n")
    assert "config.yaml' is damaged (what: no such field" in failed(
        arguments(music, output, **other), capsys
    )
    (output / "config.yaml").unlink()
    assert "holds a run without config.yaml" in failed(arguments(music, output, **other), capsys)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (dict(data__source="null"), [], "data.source: got null"),
        (dict(data__source="nowhere.csv"), [], "nowhere.csv"),
        (
            dict(training__batch_size=64),
            [],
            "training.batch_size: got 64, 64 pairs a step, expected",
        ),
        (dict(training__batch_size=1), [], "training.batch_size: got 1, expected at least 2"),
        (dict(training__bathc_size=4), [], "did you mean training.batch_size?"),
        (
            dict(data__sample_hz=8000),
            [],
            "data.sample_hz: got 8000, expected the front end's 16000",
        ),
        (dict(model__start_from="none/of/them"), [], "no folder 'none/of/them'"),
        (dict(model__audio="{patch_size: [128, 16]}"), [], "patch_size"),
        ({}, ["--resume"], "resume: no run in"),
        ({}, ["--resume", "--restart"], "resume, restart: got both"),
    ],
    ids=str,
)
def test_bad_input(
    changes: dict[str, Any],
    flags: list[str],
    message: str,
    music: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    argv = [*arguments(music, tmp_path / "out", **changes), *flags]
    assert message in failed(argv, capsys)
    assert not (tmp_path / "out").exists()


def test_starting_from_trained_weights(music: Path, tmp_path: Path, capsys: Any) -> None:
    cli.main(arguments(music, tmp_path / "first", training__steps=2))
    start = tmp_path / "first" / "latest"
    changes = dict(model__start_from=start, training__steps=1, optimizer__learning_rate=1e-12)
    assert cli.main(arguments(music, tmp_path / "second", **changes)) == 0
    first, second = (load_mulan(tmp_path / run / "latest")[0] for run in ("first", "second"))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=1e-5, atol=1e-7)
    changes["model__dim_latent"] = 5
    said = failed(arguments(music, tmp_path / "third", **changes), capsys)
    assert "is of another architecture (mulan.dim_latent = 128, not 5)" in said


def test_upstreams_front_end_must_be_asked_for(music: Path, tmp_path: Path) -> None:
    assert TrainMuLaNConfig().model.front_end == "mulan"
    changes = dict(model__front_end="upstream", training__steps=1)
    assert cli.main(arguments(music, tmp_path / "out", **changes)) == 0
    model, extra = load_mulan(tmp_path / "out" / "latest")
    assert model.audio.front_end.sample_hz is None
    assert extra["sample_rate"] == 16000


def test_a_run_with_the_old_name_of_the_front_end_is_resumed(
    music: Path, tmp_path: Path, capsys: Any
) -> None:
    changes = dict(model__front_end="upstream", training__steps=1)
    assert cli.main(arguments(music, tmp_path / "out", **changes)) == 0
    for name in ("config.yaml", "latest/config.json"):
        file = tmp_path / "out" / name
        text = file.read_text()
        assert text.count('front_end": "upstream"') + text.count('front_end: "upstream"') == 1
        file.write_text(text.replace('"upstream"', '"reference"'))
    assert cli.main(arguments(music, tmp_path / "out", **changes)) == 0
    assert "resuming at step 1 of 1" in capsys.readouterr().out


def test_print_config_and_help(capsys: Any) -> None:
    assert cli.main(["train", "mulan", "--print-config", "--set", "training.steps=7"]) == 0
    out = capsys.readouterr().out
    assert "  steps: 7  # integer: optimizer steps\n" in out
    with pytest.raises(SystemExit):
        cli.main(["train", "mulan", "--help"])
    assert (
        "training.steps  (integer; default 10000)\n      optimizer steps" in capsys.readouterr().out
    )
    code = (
        "import sys; from musiclm_fast.cli import main\n"
        "try: main(['train', 'mulan', '--help'])\n"
        "except SystemExit: pass\n"
        "main(['train', 'mulan', '--print-config'])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_state_is_plain(music: Path, tmp_path: Path) -> None:
    """Weights-only loading reads it, and it names the run's options."""
    cli.main(arguments(music, tmp_path / "out", training__steps=1))
    state = read_checkpoint(tmp_path / "out" / "latest" / "trainer.pt")
    assert state["options"]["optimizer"] == "adamw"
    assert state["averaged_steps"] == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_hugging_face_towers(frozen: bool, music: Path, tmp_path: Path, capsys: Any) -> None:
    """Tiny random encoders as both towers: trained, resumed, and loaded without their folders."""
    pytest.importorskip("transformers")
    from tests.models.test_hugging_face import audio_tower, text_tower

    for kind, tower in (("text", text_tower()), ("audio", audio_tower())):
        tower.model.save_pretrained(tmp_path / kind)
        beside = tower.tokenizer if kind == "text" else tower.feature_extractor
        beside.save_pretrained(tmp_path / kind)
    changes: dict[str, Any] = {
        f"model.{kind}": f"{{hugging_face: {tmp_path / kind}, frozen: {str(frozen).lower()}}}"
        for kind in ("text", "audio")
    }
    changes |= dict(training__steps=3, training__activation_checkpointing=str(not frozen).lower())
    assert cli.main(arguments(music, tmp_path / "out", **changes)) == 0
    assert "training complete" in capsys.readouterr().out
    for kind in ("text", "audio"):
        (tmp_path / kind).rename(tmp_path / f"{kind} moved")
    model = MuLaN.from_pretrained(tmp_path / "out" / "latest")
    before = text_tower().model.state_dict()
    after = model.text.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) is frozen
