"""The demo's figures: spectrograms before and after augmentation, loss curve, similarities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from musiclm_fast._plotting import ACCENT, LINE, pyplot, save_figure
from musiclm_fast.evaluation.metrics import collapsed_loss
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.front_end import draw_masks

if TYPE_CHECKING:
    from musiclm_fast.demo.mulan_run import DemoRun


def write_all(run: DemoRun, accuracy: dict[str, dict[int, float]]) -> None:
    """Write ``spectrograms.png``, ``loss.png`` and ``similarity.png`` to the run's folder."""
    spectrograms(run)
    loss_curve(run, accuracy)
    similarity(run, accuracy)


def _mel_ticks(config: Any, wanted: tuple[int, ...]) -> list[float]:
    # Positions of frequencies on the axis of HTK mel bands.
    def mel(hertz: float) -> float:
        return float(2595 * np.log10(1 + hertz / 700))

    low, high = mel(config.f_min), mel(config.f_max or config.sample_hz / 2)
    return [(mel(hz) - low) / (high - low) * (config.n_mels + 1) - 1 for hz in wanted]


@torch.no_grad()
def spectrograms(run: DemoRun, count: int = 3) -> None:
    """The audio tower's input for a few training notes, in evaluation and in training."""
    plt = pyplot()
    audio, data = cast(AudioSpectrogramTransformer, run.mulan.audio), run.data
    config = audio.front_end
    train = data.parts["train"]
    pitches = np.unique(data.notes.pitch[train])
    middle = train[data.notes.pitch[train] == pitches[len(pitches) // 2]]
    clips = middle[np.linspace(0, len(middle) - 1, count + 2).round().astype(int)[1:-1]]
    wavs = data.notes.audio(clips).to(run.device)
    frames = audio.spec.frames(wavs.shape[1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed + 1)
        masks = draw_masks(config, config.bands, frames, len(clips), wavs.device)
    clean = audio.spec(wavs).cpu().numpy()
    masked = audio.spec(wavs, masks).cpu().numpy()

    figure, axes = plt.subplots(
        count, 2, figsize=(9, 2.3 * count), sharex=True, sharey=True, squeeze=False
    )
    low, high = np.quantile(clean, (0.02, 0.995))
    seconds = wavs.shape[1] / data.notes.sample_rate
    hertz = (250, 1000, 2000, 4000)
    for row, clip in zip(range(count), clips.tolist(), strict=True):
        name = data.instruments[int(data.label[clip])].name
        for column, image in enumerate((clean[row], masked[row])):
            axis = axes[row][column]
            shown = axis.imshow(
                image,
                origin="lower",
                aspect="auto",
                cmap="magma",
                vmin=low,
                vmax=high,
                extent=(0, seconds, -0.5, config.bands - 0.5),
            )
            axis.set_yticks(_mel_ticks(config, hertz), [f"{hz / 1000:g}" for hz in hertz])
        axes[row][0].set_title(f"{name}, MIDI pitch {int(data.notes.pitch[clip])}", loc="left")
        axes[row][0].set_ylabel("kHz (mel)")
    axes[0][1].set_title("the same in training: masks on bands and frames", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("normalised log-mel power")
    save_figure(plt, figure, run.folder / "spectrograms.png")


def loss_curve(run: DemoRun, accuracy: dict[str, dict[int, float]]) -> None:
    """Loss of each step with the line at which a collapsed model stays, and accuracy below."""
    plt = pyplot()
    losses = np.array([loss for _, loss in run.log("train_loss")])
    steps = np.arange(1, len(losses) + 1)
    baseline = collapsed_loss(run.config.batch_size)
    figure, (top, below) = plt.subplots(2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(3, 2))
    width = max(1, min(25, len(losses) // 4))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    top.plot(steps, losses, color=LINE, alpha=0.25, linewidth=0.8, label="each step")
    top.plot(steps[width - 1 :], smooth, color=LINE, linewidth=1.8, label=f"mean of {width}")
    top.axhline(baseline, color=ACCENT, linewidth=1.2, linestyle="--")
    top.annotate(
        f"ln({run.config.batch_size} - 1) = {baseline:.2f}: nothing learned",
        (1, baseline),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=ACCENT,
    )
    top.set_ylabel("contrastive loss")
    top.legend(frameon=False, loc="lower left")
    top.set_title(f"MuLaN on {run.config.instruments} General MIDI instruments", loc="left")
    if checks := run.log("held-out pitches"):
        at, value = zip(*checks, strict=True)
        below.plot(at, [100 * v for v in value], color=LINE, marker="o", markersize=3)
    final = accuracy["held-out pitches"][1]
    below.axhline(100 / run.config.instruments, color=ACCENT, linewidth=1.2, linestyle="--")
    below.annotate(
        "chance",
        (1, 100 / run.config.instruments),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=ACCENT,
    )
    below.set_ylim(0, 100)
    below.set_ylabel("zero-shot top-1, %")
    below.set_title(
        f"at pitches held out of training; in the end {final:.1%} of all notes there", loc="left"
    )
    below.set_xlabel("step")
    save_figure(plt, figure, run.folder / "loss.png")


def similarity(run: DemoRun, accuracy: dict[str, dict[int, float]]) -> None:
    """Mean similarity of each instrument's held-out notes to each instrument's text."""
    plt = pyplot()
    matrix = run.similarity_matrix(run.data.parts["held-out pitches"]).numpy()
    names = [item.name for item in run.data.instruments]
    count = len(names)
    side = max(4.0, 0.135 * count) + 2.2
    figure, axis = plt.subplots(figsize=(side + 0.6, side))
    limit = float(np.abs(matrix).max())
    shown = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    small = max(4.5, min(9.0, 520 / max(1, count)))
    axis.set_xticks(range(count), names, rotation=90, fontsize=small)
    axis.set_yticks(range(count), names, fontsize=small)
    axis.tick_params(length=0)
    axis.set_xlabel("text")
    axis.set_ylabel("sound, at pitches held out of training")
    axis.set_title(
        f"cosine similarity; the nearest text is right for "
        f"{accuracy['held-out pitches'][1]:.1%} of the notes",
        loc="left",
    )
    families = [item.family for item in run.data.instruments]
    for index in range(1, count):
        if families[index] != families[index - 1]:
            axis.axhline(index - 0.5, color="white", linewidth=0.8)
            axis.axvline(index - 0.5, color="white", linewidth=0.8)
    figure.colorbar(shown, ax=axis, shrink=0.5, pad=0.02)
    save_figure(plt, figure, run.folder / "similarity.png")
