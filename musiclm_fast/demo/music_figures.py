"""The music demo's figures and sounds: eight prompts, each below a real melody."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from musiclm_fast._plotting import pyplot, save_figure
from musiclm_fast.evaluation.instrument_classifier import log_mel

if TYPE_CHECKING:
    from musiclm_fast.demo.music_run import MusicDemo

SHOWN = 8


_BANDS = 80


def write_all(demo: MusicDemo, waves: Tensor, ranks: list[int]) -> list[Path]:
    """Write a wav file and its spectrogram for eight of the prompts, evenly spaced.

    Args:
        demo: the demo.
        waves: ``(prompts, samples)``, what was generated.
        ranks: the classifier's rank of the prompted instrument.

    Returns:
        The files.
    """
    count = len(waves)
    written = []
    sounds = sorted((demo.folder / "generated").glob("*.wav"))
    shown = min(SHOWN, count)
    for index in (i * count // shown for i in range(shown)):
        item = demo.instruments[index]
        path = demo.folder / f"{item.name.replace(' ', '-')}.wav"
        shutil.copyfile(sounds[index], path)
        real = demo.held_out[int(np.flatnonzero(demo.held_out.label == index)[0])]
        picture = path.with_suffix(".png")
        titles = (
            f"a real melody: {item.name}",
            f'generated for "{demo.prompts()[index]}"; rank {ranks[index]} by the classifier',
        )
        _spectrograms(picture, (real, waves[index]), titles, demo.rate)
        written += [path, picture]
    return written


def _spectrograms(
    path: Path, clips: tuple[Tensor, ...], titles: tuple[str, ...], rate: int
) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(len(clips), 1, figsize=(8, 2.4 * len(clips)), sharex=True)
    for axis, clip, title in zip(axes, clips, titles, strict=True):
        image = log_mel(clip[None], rate, _BANDS, 128)[0].t().numpy()
        shown = axis.imshow(
            image, origin="lower", aspect="auto", cmap="magma", vmin=-50, vmax=0,
            extent=(0, len(clip) / rate, -0.5, _BANDS - 0.5),
        )  # fmt: skip
        hertz = (250, 500, 1000, 2000, 4000)
        axis.set_yticks(_positions(hertz, rate), [f"{hz / 1000:g}" for hz in hertz])
        axis.set_ylabel("kHz (mel)")
        axis.set_title(title, loc="left")
    axes[-1].set_xlabel("seconds")
    figure.colorbar(shown, ax=axes, label="dB", shrink=0.6, pad=0.02)
    save_figure(plt, figure, path)


def _positions(hertz: tuple[int, ...], rate: int) -> Any:
    # Of frequencies on the axis of HTK mel bands.
    def mel(hz: Any) -> Any:
        return 2595 * np.log10(1 + np.asarray(hz) / 700)

    return mel(hertz) / mel(rate / 2) * (_BANDS + 1) - 1
