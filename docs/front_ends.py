"""Draws docs/front_ends.png: what each front end makes of a clip, also in training.

``python docs/front_ends.py`` renders eight notes of a General MIDI marimba over a cello (the
``demo`` extra and tinysoundfont), so it needs no network and gives the same picture every time.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

from musiclm_fast.demo.rendering import PCM_SCALE, render_notes
from musiclm_fast.models.front_end import PRESETS, Spectrogram, draw_masks

mpl.use("Agg")
from matplotlib import pyplot as plt

RATE = 16_000


def clip() -> Tensor:
    """(1, samples): a marimba's broken chords over a cello, 4 s."""
    marimba = render_notes([12], [60, 64, 67, 72], [120], sample_rate=RATE, seconds=0.5)
    cello = render_notes([42], [48, 43], [88], sample_rate=RATE, seconds=2.0)
    notes = torch.from_numpy(marimba.pcm).float().repeat(2, 1).flatten()
    ground = torch.from_numpy(cello.pcm).float().flatten()
    return ((notes + ground) / (2 * PCM_SCALE))[None]


def main() -> None:
    """Draw and save the picture."""
    wav = clip()
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9})
    figure, axes = plt.subplots(4, 3, figsize=(9, 9), layout="constrained")
    axes[0, 0].plot(torch.arange(wav.shape[1]) / RATE, wav[0], lw=0.3, color="#204060")
    axes[0, 0].set(title="the clip", xlabel="seconds", xlim=(0, 4))
    for empty in axes[0, 1:]:
        empty.axis("off")
    for row, (name, config) in zip(axes[1:], PRESETS.items(), strict=True):
        spec = Spectrogram(config)
        torch.manual_seed(7)
        masks = draw_masks(config, config.bands, spec.frames(wav.shape[1]), 1, wav.device)
        plain = spec(wav)
        pictures = {
            f"{name}: {config.bands} bands, {plain.shape[2]} frames": plain,
            "in training: masked": spec(wav, masks),
            "time_stretch, 0.8 times as fast": spec(wav, stretch_rate=torch.tensor([0.8])),
        }
        low, high = plain.min().item(), plain.max().item()
        for axis, (title, picture) in zip(row, pictures.items(), strict=True):
            axis.imshow(
                picture[0], origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma",
                extent=(0, 4, 0, config.bands), interpolation="antialiased",
            )  # fmt: skip
            axis.set(title=title, xlabel="seconds", ylabel="band")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
