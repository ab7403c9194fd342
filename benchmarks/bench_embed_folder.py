"""Embedding a folder of recordings: read each file, embed windows of 10 s every second, average.

Ours is ``MuLaN.embed_audio`` on each file; upstream has no such function, so the benchmark reads
and cuts the same windows for it and averages its latents. Both have equal weights and a spectrogram
of window 400 of 512, hop 160, at 16 kHz.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings
from musiclm_fast._wording import plural

HZ = 16_000
WINDOW, STRIDE = 10, 1  # seconds


@dataclasses.dataclass(frozen=True)
class Size:
    """Number and seconds of the recordings, and the audio tower's width and depth."""

    files: int
    seconds: int
    dim: int = 512
    depth: int = 6


def folder(size: Size) -> Path:
    """A folder of noise, deleted when this process ends."""
    import soundfile

    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(size.files):
        wav = 0.1 * torch.randn(size.seconds * HZ, generator=generator)
        soundfile.write(path / f"{index}.wav", wav.numpy(), HZ)
    return path


def build(kind: str, size: Size, device: str) -> torch.nn.Module:
    """MuLaN of upstream or of this package, with equal weights."""
    import musiclm_fast

    torch.manual_seed(0)
    tower = dict(dim=size.dim, depth=size.depth, heads=size.dim // 64, dim_head=64)
    text = dict(dim=64, depth=2, heads=1)
    if kind == "ours":
        from musiclm_fast.models.front_end import FrontEnd

        sizes = FrontEnd(sample_hz=HZ, n_fft=512, win_length=400, hop_length=160)
        audio = musiclm_fast.AudioSpectrogramTransformer(**tower, front_end=sizes)
        model = musiclm_fast.MuLaN(audio, musiclm_fast.TextTransformer(**text))
    else:
        from tests.upstream import live

        package = live.load().musiclm
        audio = package.AudioSpectrogramTransformer(
            **tower, spec_n_fft=512, spec_win_length=400, spec_hop_length=160
        )
        model = package.MuLaN(audio, package.TextTransformer(**text))
    return model.to(device).eval()


def embed(kind: str, model: torch.nn.Module, path: Path, device: str) -> Tensor:
    """One unit vector per file, ``(files, dim_latent)``."""
    files = sorted(path.glob("*.wav"))
    if kind == "ours":
        return torch.stack([model.embed_audio(file) for file in files])
    return torch.stack([_theirs(model, file, device) for file in files])


@torch.no_grad()
def _theirs(model: torch.nn.Module, file: Path, device: str) -> Tensor:
    import soundfile

    wav = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    last = max(0, len(wav) - WINDOW * HZ)
    starts = [*range(0, last, STRIDE * HZ), last]
    clips = torch.stack([wav[start : start + WINDOW * HZ] for start in starts]).to(device)
    # In chunks: at 16 windows its position bias alone takes 13 GB.
    latents = torch.cat([model.get_audio_latents(part) for part in clips.split(2)])
    return F.normalize(latents.sum(dim=0), dim=0)


def job(kind: str, size: Size, device: str) -> Callable[[], Any]:
    """Embed a folder of that size."""
    model, path = build(kind, size, device), folder(size)
    return lambda: embed(kind, model, path, device)


def memory(kind: str, size: Size, device: str) -> int:
    """Peak memory in bytes."""
    if device == "cuda":
        return harness.gpu_memory(lambda: job(kind, size, device))
    return int(harness.in_fresh_process(peak, kind, size))


def peak(kind: str, size: Size) -> int:
    """The same on the CPU; call in a fresh process."""
    return harness.extra_memory(lambda: job(kind, size, "cpu"))


def check(size: Size, device: str) -> None:
    """Both embed a recording equally.

    Raises:
        AssertionError: they do not.
    """
    one = dataclasses.replace(size, files=1, seconds=WINDOW + 1)
    ours = build("ours", one, device)
    theirs, backend = harness.oracle(
        lambda: build("theirs", one, device), lambda: build("ours", one, device)
    )
    ours.load_state_dict(theirs.state_dict())
    path = folder(one)
    with backend:
        expected = embed("theirs", theirs, path, device)
    torch.testing.assert_close(embed("ours", ours, path, device), expected, atol=1e-4, rtol=1e-4)


def results(settings: Settings) -> list[Result]:
    """Recordings of 12 s; on a GPU, of one minute."""
    size = settings.pick(
        Size(1, 12), full=Size(4, 30), gpu=Size(2, 60), tiny=Size(1, 10, dim=64, depth=2)
    )
    device = settings.device
    contenders = {
        name: Contender(
            functools.partial(job, kind, size, device),
            memory=functools.partial(memory, kind, size, device),
            once=kind == "theirs" and settings.mode == "quick",
            role="ours" if kind == "ours" else "peer",
        )
        for name, kind in (("ours", "ours"), ("musiclm-pytorch", "theirs"))
    }
    case = f"{plural(size.files, 'recording')} of {size.seconds} s"
    return harness.measure(
        "embedding a folder", case, contenders, settings,
        check=functools.partial(check, size, device), rounds=3,
        headline=f"embedding a folder, {case}, "
        f"10 s windows every second",
    )  # fmt: skip
