"""Captioned sounds: time to open a collection, to draw a batch, and to wait for it in a step.

It measures: the time to index 20,000 small files, with a manifest or in shards (goal: 30 s); the
time of a batch of ten-second clips from minute-long files, by format, against decoding whole files
(``data convert`` writes the last format); the share of a training step of the demo's model that
waits for its batch (goal: 5%).
"""

from __future__ import annotations

import atexit
import csv
import dataclasses
import functools
import io
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Contender, Result, Settings

HZ = 16_000


QUICK = False  # not part of `make bench`; ask for it by name


def new_folder() -> Path:
    """A folder that is deleted when this process ends."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def sound(seconds: float, hz: int = HZ, channels: int = 1) -> np.ndarray:
    """A tone whose pitch wanders: louder at low frequencies, like music."""
    raw = np.random.default_rng(0).normal(size=(round(seconds * hz), channels))
    return (0.4 * np.sin(np.cumsum(0.1 + 0.1 * raw, axis=0))).astype(np.float32)


@functools.cache
def small_files(count: int, seconds: float) -> Path:
    """``count`` short wav files with a manifest, and the same in ``shards``."""
    import soundfile

    folder = new_folder()
    content = io.BytesIO()
    soundfile.write(content, sound(seconds), HZ, format="WAV", subtype="PCM_16")
    (folder / "shards").mkdir()
    with open(folder / "manifest.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption"])
        for first in range(0, count, 1000):
            part = f"{first // 1000:03}"
            (folder / part).mkdir()
            with tarfile.open(folder / "shards" / f"{part}.tar", "w") as tar:
                for number in range(first, min(count, first + 1000)):
                    caption = f"sound number {number} of a small collection"
                    path = f"{part}/{number:05}.wav"
                    (folder / path).write_bytes(content.getbuffer())
                    table.writerow([path, caption])
                    for name, data in (("wav", content.getvalue()), ("txt", caption.encode())):
                        info = tarfile.TarInfo(f"{number:05}.{name}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return folder


def opened(source: Path, cache: Path, clip_seconds: float | None = None) -> Any:
    """The collection at 16 kHz."""
    from musiclm_fast.datasets.opening import open_dataset

    return open_dataset(source, sample_hz=HZ, clip_seconds=clip_seconds, cache_folder=cache)


def indexing(count: int, settings: Settings) -> list[Result]:
    """Opening a collection of small files; and reading all of it, as ``data check`` does."""
    from musiclm_fast.datasets.check import check_data

    name = f"{count:,} files of 0.25 s"
    if settings.case not in name:
        return []
    folder, cache = small_files(count, 0.25), new_folder()
    shards = folder / "shards"

    def check() -> None:
        for source in (folder / "manifest.csv", shards):
            assert len(opened(source, cache)) == count, f"{source} is not whole"

    jobs: dict[str, Callable[[], Any]] = {
        "a manifest": lambda: opened(folder / "manifest.csv", cache),
        "shards, first time": lambda: opened(shards, new_folder()),
        "shards, indexed before": lambda: opened(shards, cache),
        "data check, one process": lambda: check_data(opened(folder / "manifest.csv", cache)),
    }
    contenders = {
        name: Contender(functools.partial(lambda job: job, job), role="ours", once="check" in name)
        for name, job in jobs.items()
    }
    return harness.measure("indexing a collection", name, contenders, settings, check=check)


@functools.cache
def long_files(suffix: str, count: int, seconds: int) -> Path:
    """Stereo files at 44.1 kHz; ``converted``: the output of ``data convert``."""
    import soundfile

    from musiclm_fast.datasets.convert import convert_data

    folder = new_folder()
    if suffix == "converted":
        convert_data(opened(long_files("flac", count, seconds), folder), folder)
        return folder / "manifest.csv"
    with open(folder / "manifest.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "caption"])
        for number in range(count):
            name = f"{number}.{suffix}"
            wav = sound(seconds, 44_100, 2)
            with soundfile.SoundFile(folder / name, "w", 44_100, 2) as written:
                for first in range(0, len(wav), 44_100):  # all at once, libsndfile's ogg crashes
                    written.write(wav[first : first + 44_100])
            table.writerow([name, f"piece {number}"])
    return folder / "manifest.csv"


def decode_whole(table: Path, clip: int) -> None:
    """What a loader without seeking does: read each file, resample it, take a part."""
    from musiclm_fast.audio.reading import read_sound

    for path in sorted(table.parent.rglob("*.*")):
        if path != table:
            read_sound(path, HZ).wav[: clip * HZ].clone()


def drawing(suffix: str, settings: Settings) -> list[Result]:
    """A batch of clips, one from each file."""
    count, seconds, clip = settings.pick((4, 60, 10), tiny=(2, 2, 1))
    name = f"{count} x {clip} s out of {seconds} s, {suffix}"
    if settings.case not in name:
        return []
    table = long_files(suffix, count, seconds)
    sounds = opened(table, table.parent, clip)

    def draw() -> None:
        for index in range(count):
            sounds.draw(index, index)

    def check() -> None:
        rows = [sounds.draw(index, 0) for index in range(count)]
        assert all(len(row.wav) == clip * HZ and not row.skipped for row in rows), "not drawn"

    contenders = {
        "a draw's part": Contender(lambda: draw, role="ours"),
        "the whole file, resampled": Contender(
            lambda: functools.partial(decode_whole, table, clip)
        ),
    }
    return harness.measure("drawing clips", name, contenders, settings, check=check)


class Waiting:
    """Batches, and the seconds that the consumer waited for them."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - start
        return batch


def step(
    source: Path, workers: int, batch: int, seconds: float, shares: list[float]
) -> Callable[[], Any]:
    """Five training steps of the demo's model; each run adds the share of its time that the
    training process waited for data."""
    from musiclm_fast.demo.mulan_run import DemoConfig
    from musiclm_fast.training.mulan import MuLaNTrainer

    torch.manual_seed(0)
    folder = new_folder()
    trainer = MuLaNTrainer(
        DemoConfig().build(), opened(source, folder, seconds), batch_size=batch, valid_frac=0.0,
        num_train_steps=10**6, save_model_every=10**6, results_folder=folder / "run",
        num_workers=workers, accelerate_kwargs=dict(cpu=True),
    )  # fmt: skip
    batches = trainer._batches = Waiting(trainer._loader())

    def run() -> None:
        before, start = batches.seconds, time.perf_counter()
        for _ in range(5):
            trainer.train_step()
        shares.append((batches.seconds - before) / (time.perf_counter() - start))

    return run


def loading(settings: Settings) -> list[Result]:
    """Steps on clips of a second, read in the training process or ahead of it."""
    count, batch, seconds = settings.pick((256, 64, 1.0), tiny=(4, 2, 0.5))
    name = f"demo's model, {batch} x {seconds:g} s of wav"
    if settings.case not in name:
        return []
    source = small_files(count, 2 * seconds) / "manifest.csv"

    def check() -> None:
        from musiclm_fast.datasets.collation import collate

        sounds = opened(source, new_folder(), seconds)
        rows = collate([sounds.draw(index, 0) for index in range(batch)])
        assert rows["wavs"].shape == (batch, round(seconds * HZ)), "another batch"

    readers = {"read in the training process": 0, "read by one worker": 1}
    shares: dict[str, list[float]] = {reader: [] for reader in readers}
    contenders = {
        reader: Contender(
            functools.partial(step, source, workers, batch, seconds, shares[reader]), role="ours"
        )
        for reader, workers in readers.items()
    }
    found = harness.measure(
        "five training steps and their data", name, contenders, settings, check=check,
        rounds=settings.pick(5),
    )  # fmt: skip
    return [
        dataclasses.replace(
            result, note=f"{statistics.median(shares[result.contender]):.1%} spent waiting for data"
        )
        for result in found
    ]


def results(settings: Settings) -> list[Result]:
    """Runs on the CPU in every mode: it reads sounds."""
    settings = dataclasses.replace(settings, device="cpu")
    count = settings.pick(20_000, tiny=4)
    found = indexing(count, settings)
    for suffix in settings.pick(("wav", "flac", "ogg", "mp3", "converted"), tiny=("ogg", "wav")):
        found += drawing(suffix, settings)
    return found + loading(settings)
