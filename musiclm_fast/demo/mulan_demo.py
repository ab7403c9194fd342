"""``musiclm-fast demo``: render, train, evaluate and draw."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musiclm_fast._files import write_json
from musiclm_fast._optional import require
from musiclm_fast._tables import aligned
from musiclm_fast._wording import plural
from musiclm_fast.demo.mulan_run import (
    MODEL_FILE,
    RESULTS_FILE,
    TRAINING,
    DemoConfig,
    DemoRun,
    Notes,
    plain_config,
)
from musiclm_fast.evaluation.metrics import collapsed_loss
from musiclm_fast.models.checkpoint import save_checkpoint
from musiclm_fast.training.run_folder import RunFolder

EXAMPLE_PROGRAMS = (0, 24, 56)  # grand piano, nylon string guitar, trumpet


def results_table(accuracy: dict[str, dict[int, float]], data: Notes, config: DemoConfig) -> str:
    """The accuracies as a table, with chance and the number of clips."""
    pitches = {k: len(np.unique(data.notes.pitch[v])) for k, v in data.parts.items()}
    title = f"zero-shot, {plural(config.instruments, 'instrument')}"
    rows: list[tuple[str, ...]] = [(title, "pitches", "clips", "top-1", "top-5")]
    for name, by_k in accuracy.items():
        shares = (f"{by_k[k]:.1%}" if k in by_k else "" for k in (1, 5))
        rows.append((name, str(pitches[name]), str(len(data.parts[name])), *shares))
    chance = (f"{min(1, k / config.instruments):.1%}" for k in (1, 5))
    return aligned([*rows, ("chance", "", "", *chance)])


def run_demo(
    folder: str | os.PathLike[str],
    config: DemoConfig | None = None,
    *,
    restart: bool = False,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Render, train (or resume), evaluate, and write everything to ``folder``.

    Files: ``mulan.pt`` (the model), ``training/`` (checkpoints and the log), ``results.json``,
    ``spectrograms.png``, ``loss.png``, ``similarity.png`` and a few held-out notes as wav files.

    Args:
        folder: of the output.
        config: the recipe.
        restart: discard a saved run in the folder.
        device: None takes a GPU if available.
        say: receives progress messages.

    Returns:
        What ``results.json`` holds.
    """
    began = time.monotonic()
    config = config or DemoConfig()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for package in ("matplotlib", "soundfile"):  # needed only after training
        require(package)

    data = Notes.render(config)
    rendered = time.monotonic() - began
    say(
        f"{plural(len(data.notes), 'note')} of {plural(config.instruments, 'instrument')}, "
        f"{len(data.parts['train'])} to train on ({rendered:.0f} s)"
    )

    if restart:
        RunFolder(folder / TRAINING).clear()
    run = DemoRun(config, data, folder, device)
    baseline = collapsed_loss(config.batch_size)
    size = sum(p.numel() for p in run.mulan.parameters()) / 1e6
    say(
        f"training {size:.1f} M parameters on {device}, {plural(config.steps, 'step')} of "
        f"{plural(config.batch_size, 'pair')}; a model that learns nothing stays at a loss of "
        f"ln({config.batch_size - 1}) = {baseline:.2f}"
    )
    run.train()
    save_checkpoint(
        folder / MODEL_FILE,
        run.mulan,
        sample_rate=16_000,
        clip_seconds=config.clip_seconds,
        labels=[item.name for item in data.instruments],
    )

    accuracy = run.evaluate()
    recent = [loss for _, loss in run.log("train_loss")[-50:]]
    results = {
        "config": plain_config(config),
        "accuracy": {
            part: {f"top-{k}": v for k, v in by_k.items()} for part, by_k in accuracy.items()
        },
        "chance": 1 / config.instruments,
        "final_loss": sum(recent) / len(recent),
        "collapsed_loss": baseline,
        "training_seconds": round(run.trainer.seconds, 1),
        "threads": torch.get_num_threads(),
        "device": str(run.device),
        "torch": torch.__version__,
    }
    write_json(folder / RESULTS_FILE, results)

    from musiclm_fast.demo import mulan_figures

    mulan_figures.write_all(run, accuracy)
    examples = write_examples(data, folder)

    say("")
    say(results_table(accuracy, data, config))
    say(
        f"{'loss, mean of last 50 steps':<28}{results['final_loss']:>8.2f}   "
        f"(ln({config.batch_size - 1}) = {baseline:.2f})"
    )
    say(
        f"{'training time':<28}{run.trainer.seconds:>7.0f}s   "
        f"({1000 * run.trainer.seconds / max(1, run.trainer.step):.0f} ms a step)"
    )
    say("")
    say(
        f"wrote to {folder}/: {MODEL_FILE}, {RESULTS_FILE}, spectrograms.png, loss.png, "
        f"similarity.png, {', '.join(path.name for path in examples)}"
    )
    names = " ".join(f'"{path.stem.replace("-", " ")}"' for path in reversed(examples))
    say(f"try: musiclm-fast similarity {examples[-1]} {names} --checkpoint {folder / MODEL_FILE}")
    return results


def write_examples(data: Notes, folder: Path) -> list[Path]:
    """Write a held-out note of each of a few instruments as wav files, to try ``similarity`` on."""
    soundfile = require("soundfile")

    clips = data.parts["held-out pitches"]
    written = []
    for wanted in EXAMPLE_PROGRAMS:
        label = min(
            range(len(data.instruments)),
            key=lambda index: abs(data.instruments[index].program - wanted),
        )
        path = folder / f"{data.instruments[label].name.replace(' ', '-')}.wav"
        own = clips[data.label[clips].numpy() == label]
        if len(own) and path not in written:
            soundfile.write(path, data.notes.pcm[own[len(own) // 2]], data.notes.sample_rate)
            written.append(path)
    return written
