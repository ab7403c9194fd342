"""The command line: what it answers, how it fails, and that it starts fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import musiclm_fast
from musiclm_fast import cli, info
from musiclm_fast.models.checkpoint import save_checkpoint

soundfile = pytest.importorskip("soundfile", reason="needs the demo extra")
soxr = pytest.importorskip("soxr", reason="needs the demo extra")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    sizes = dict(dim=16, depth=1, heads=2, dim_head=8)
    audio = musiclm_fast.AudioSpectrogramTransformer(**sizes, front_end="mulan")
    mulan = musiclm_fast.MuLaN(audio, musiclm_fast.TextTransformer(**sizes), dim_latent=8)
    path = tmp_path_factory.mktemp("model") / "mulan.pt"
    save_checkpoint(path, mulan, sample_rate=16000, clip_seconds=0.5)
    return path, mulan.eval()


@pytest.fixture(scope="module")
def tone(tmp_path_factory):
    """A second and a half of a chirp in noise at 16 kHz, as a wav file and as samples."""
    seconds = np.arange(24000) / 16000
    samples = 0.3 * np.sin(2 * np.pi * (300 + 200 * seconds) * seconds)
    samples = (samples + np.random.default_rng(0).normal(0, 0.03, 24000)).astype(np.float32)
    path = tmp_path_factory.mktemp("sound") / "tone.wav"
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    return path, samples


def answer(capsys, *argv):
    """Similarities that the command prints as JSON."""
    assert cli.main(["similarity", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_similarity_is_the_models(model, tone, capsys):
    path, mulan = model
    got = answer(capsys, tone[0], "a flute", "a drum", "--checkpoint", path)
    starts = (0, 4000, 8000, 12000, 16000)
    windows = torch.stack([torch.from_numpy(tone[1])[s : s + 8000] for s in starts])
    with torch.no_grad():
        clip = torch.nn.functional.normalize(mulan.get_audio_latents(windows).mean(0), dim=0)
        expected = mulan.get_text_latents(raw_texts=["a flute", "a drum"]) @ clip
    assert got["windows"] == 5
    assert got["seconds"] == 1.5
    assert list(got["similarity"]) == ["a flute", "a drum"]
    np.testing.assert_allclose([*got["similarity"].values()], expected.numpy(), atol=1e-5)


def test_similarity_prints_a_table(model, tone, capsys):
    status = cli.main(["similarity", str(tone[0]), "a flute", "x", "--checkpoint", str(model[0])])
    first, flute, x = capsys.readouterr().out.splitlines()
    assert status == 0
    assert "1.50 s; 5 windows of 0.5 s" in first
    assert flute.split()[:2] == ["a", "flute"]
    assert -1 <= float(flute.split()[-1]) <= 1
    assert len(x) == len(flute)


@pytest.mark.parametrize("suffix", [".flac", ".wav"])
def test_other_rate_and_channels(suffix, model, tone, capsys, tmp_path):
    """A stereo file at another rate gives nearly the same answer as the mono one."""
    path = tmp_path / f"tone{suffix}"
    resampled = soxr.resample(tone[1], 16000, 44100, quality="VHQ")
    soundfile.write(path, np.stack([1.5 * resampled, 0.5 * resampled], axis=1), 44100)
    expected = answer(capsys, tone[0], "a flute", "--checkpoint", model[0])["similarity"]
    got = answer(capsys, path, "a flute", "--checkpoint", model[0])["similarity"]
    assert got["a flute"] == pytest.approx(expected["a flute"], abs=0.1)
    cli.main(["similarity", str(path), "a flute", "--checkpoint", str(model[0])])
    said = capsys.readouterr().out
    assert "2 channels averaged to mono, resampled from 44100 to 16000 Hz" in said


def test_a_file_shorter_than_the_clip_is_padded(model, tone, capsys, tmp_path):
    soundfile.write(tmp_path / "short.wav", tone[1][:1000], 16000)
    assert answer(capsys, tmp_path / "short.wav", "a", "--checkpoint", model[0])["windows"] == 1


def test_silent_windows_are_left_out(model, tone, capsys, tmp_path):
    padded = np.concatenate([tone[1][:8000], np.zeros(40000, np.float32)])
    soundfile.write(tmp_path / "late.wav", padded, 16000)
    assert answer(capsys, tmp_path / "late.wav", "a", "--checkpoint", model[0])["windows"] == 2


def wav(path, samples, rate=16000):
    soundfile.write(path, np.asarray(samples, np.float32), rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.wav", "sound: no file"),
        (lambda folder: folder, "sound: no file"),
        (lambda folder: wav(folder / "a.wav", []), "holds no samples"),
        (lambda folder: wav(folder / "a.wav", [0.0, np.nan] * 500), "NaN or infinity"),
        (lambda folder: wav(folder / "a.wav", [0.0] * 9000), "silence"),
        (lambda folder: Path(__file__), "cannot be read as sound"),
    ],
)
def test_bad_sound(make, message, model, capsys, tmp_path):
    argv = ["similarity", str(make(tmp_path)), "a flute", "--checkpoint", str(model[0])]
    assert cli.main(argv) == cli.FAILED
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("musiclm-fast similarity: error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file"), (b"", "damaged"), (b"not a zip", "damaged")]
)
def test_bad_checkpoint(content, message, tone, capsys, tmp_path):
    path = tmp_path / "model.pt"
    if content is not None:
        path.write_bytes(content)
    argv = ["similarity", str(tone[0]), "a flute", "--checkpoint", str(path)]
    assert cli.main(argv) == cli.FAILED
    assert message in capsys.readouterr().err
    with pytest.raises((ValueError, FileNotFoundError)):
        cli.main(["--traceback", *argv])


def test_no_model_yet(tone, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["similarity", str(tone[0]), "a flute"]) == cli.FAILED
    assert "`musiclm-fast demo` trains" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text(text, model, tone, capsys):
    argv = ["similarity", str(tone[0]), text, "--checkpoint", str(model[0])]
    assert cli.main(argv) == cli.FAILED
    assert "text: got" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert musiclm_fast.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("failures", [0, 2])
def test_info_check(monkeypatch, failures):
    monkeypatch.setattr(info, "check", lambda: failures)
    assert cli.main(["info", "--check"]) == (failures > 0)


@pytest.mark.parametrize("argv", [[], ["dance"], ["similarity", "a.wav"], ["demo", "--steps", "x"]])
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: musiclm-fast" in capsys.readouterr().err


def test_demo_refuses_before_rendering(capsys, tmp_path):
    assert cli.main(["demo", "--output", str(tmp_path / "x"), "--instruments", "500"]) == cli.FAILED
    assert "instruments: got 500" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_demo_says_how_to_go_on_when_stopped(capsys, tmp_path, monkeypatch):
    from musiclm_fast.demo import mulan_demo as demo

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", stopped)
    assert cli.main(["demo", "--output", str(tmp_path)]) == cli.INTERRUPTED
    assert "resumes the run" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['musiclm-fast', '--help']\n"
        "from musiclm_fast.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "similarity" in run.stdout


def test_module_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "musiclm_fast", "--version"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == musiclm_fast.__version__
