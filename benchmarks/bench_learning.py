"""What a MuLaN learns in minutes: notes of all 128 General MIDI instruments, named by text.

    python -m benchmarks.bench_learning --seeds 0 1 2 --output demo-output/learning

trains the demo's recipe once per seed, then once with upstream's default front end for as many
minutes, and writes ``learning.md`` and ``learning.png``. It measures zero-shot accuracy at held-out
pitches, at a held-out octave, and with one unseen sentence instead of three. The same command
resumes a stopped run; ``--run mulan 0`` trains one model alone.

Minutes are steps times the time of a step. That time is measured first, both front ends
interleaved, so the training runs may share the machine with other work.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, tables
from musiclm_fast._plotting import pyplot
from musiclm_fast.demo.instruments import PROMPT_TEMPLATES, zero_shot_prompts
from musiclm_fast.demo.mulan_run import DemoConfig, DemoRun, Notes
from musiclm_fast.evaluation.metrics import embed_clips, label_latents, zero_shot_accuracy

RECIPE = DemoConfig(instruments=128, steps=8000)
FRONT_ENDS = ("mulan", "upstream")


def step_seconds(data: Notes, folder: Path, rounds: int = 8) -> dict[str, float]:
    """Median time of a training step with each front end, interleaved."""
    file = folder / "step_seconds.json"
    if not file.exists():
        runs = {
            name: DemoRun(replace(RECIPE, front_end=name), data, folder / "timing" / name)
            for name in FRONT_ENDS
        }
        steps = {name: run.trainer.train_step for name, run in runs.items()}
        times = harness.interleave(steps, rounds=rounds, warmup=2)
        found = {name: timing.median for name, timing in times.items()}
        file.write_text(json.dumps({**found, **harness.environment()}))
    return json.loads(file.read_text())


def recipe(front_end: str, seed: int, seconds: dict[str, float]) -> DemoConfig:
    """The recipe; with upstream's front end, as many steps as fit in the same time."""
    steps = round(RECIPE.steps * seconds["mulan"] / seconds[front_end])
    return replace(RECIPE, front_end=front_end, seed=seed, steps=steps)


def train(config: DemoConfig, data: Notes, folder: Path) -> dict[str, Any]:
    """Train, resume, or read the finished run's results."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "learning.json"
    if file.exists():
        return json.loads(file.read_text())
    run = DemoRun(config, data, folder)
    run.train()
    results = {
        "accuracy": run.evaluate(),
        "one unseen sentence": by_sentence(run),
        "checks": run.log("held-out pitches"),
        "loss": float(np.mean([loss for _, loss in run.log("train_loss")[-50:]])),
        "steps": config.steps,
    }
    file.write_text(json.dumps(results))
    return json.loads(file.read_text())


def by_sentence(run: DemoRun) -> dict[str, dict[int, float]]:
    """Accuracy at held-out pitches with one sentence per label, the mean over forms.

    With the instrument's name, and with its other names (training has those in other forms).
    """
    data = run.data
    clips = data.parts["held-out pitches"]
    audio = embed_clips(run.mulan, lambda part: data.notes.audio(clips[part]), len(clips))
    label = data.label[clips]
    named: dict[str, list[list[str]]] = {"name": [], "synonym": []}
    for form in PROMPT_TEMPLATES:
        named["name"].append([p[0] for p in zero_shot_prompts(data.instruments, [form])])
        for other in range(min(len(item.synonyms) for item in data.instruments)):
            renamed = [replace(item, name=item.synonyms[other]) for item in data.instruments]
            named["synonym"].append([p[0] for p in zero_shot_prompts(renamed, [form])])
    found = {}
    for kind, sets in named.items():
        each = [
            zero_shot_accuracy(audio, label_latents(run.mulan, [[t] for t in texts]), label)
            for texts in sets
        ]
        found[kind] = {k: float(np.mean([one[k] for one in each])) for k in (1, 5)}
    return found


def described(data: Notes) -> str:
    """The recipe in words."""
    c = RECIPE
    pitches = {name: len(set(data.notes.pitch[part])) for name, part in data.parts.items()}
    return (
        f"Notes of all {c.instruments} General MIDI instruments, {len(data.notes):,} clips of "
        f"{c.clip_seconds:g} s. Training has {len(data.parts['train']):,} at {pitches['train']} "
        f"pitches; {pitches['held-out pitches']} pitches between them and "
        f"{pitches['held-out octave']} in one octave are held out. A MuLaN of dim {c.dim}, "
        f"{c.depth} audio and {c.text_depth} text blocks, patches of {c.patch_size[0]} x "
        f"{c.patch_size[1]} (16 x 16 with upstream's front end), {c.steps:,} steps of "
        f"{c.batch_size} pairs, AdamW at {c.learning_rate:g} with a cosine; notes detuned by up to "
        f"{c.detune_cents:g} cents, up to {c.extra_words} random words around captions, "
        f"temperature capped at {c.max_temperature:g} (`DemoConfig`). Prompts are three sentences "
        "that no training caption has. Minutes are steps times the median time of a step, two "
        "threads, both front ends interleaved on a quiet machine. Upstream's front end trains for "
        "as many minutes."
    )


def table(results: dict[str, dict[str, Any]], seconds: dict[str, float]) -> str:
    heads = (
        "front end, seed", "minutes", "steps", "held-out pitches, top-1", "top-5",
        "one unseen sentence, top-1", "with a synonym", "held-out octave, top-1", "top-5", "loss",
    )  # fmt: skip
    lines = []
    for name, result in results.items():
        held, octave = (
            result["accuracy"][part] for part in ("held-out pitches", "held-out octave")
        )
        minutes = result["steps"] * seconds[name.split(",")[0]] / 60
        sentence = result["one unseen sentence"]
        lines.append((
            name, f"{minutes:.1f}", str(result["steps"]), f"{held['1']:.1%}", f"{held['5']:.1%}",
            f"{sentence['name']['1']:.1%}", f"{sentence['synonym']['1']:.1%}",
            f"{octave['1']:.1%}", f"{octave['5']:.1%}", f"{result['loss']:.2f}",
        ))  # fmt: skip
    chance = ("chance", "", "", "0.8%", "3.9%", "0.8%", "0.8%", "0.8%", "3.9%", "4.14")
    return tables.markdown(heads, [*lines, chance])


def plot(results: dict[str, dict[str, Any]], seconds: dict[str, float], path: Path) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    for name, result in results.items():
        front_end = name.split(",")[0]
        steps, accuracy = np.array(result["checks"]).T
        colour = "tab:blue" if front_end == "mulan" else "tab:red"
        minutes = steps * seconds[front_end] / 60
        axis.plot(minutes, 100 * accuracy, "o-", ms=3, color=colour, alpha=0.8, label=name)
    axis.axhline(80, color="0.7", lw=0.8, ls="--")
    axis.set(
        xlabel="minutes of training on two cores", ylabel="zero-shot top-1, %", ylim=(0, 100),
        title="256 notes at pitches held out of training, 128 instruments",
    )  # fmt: skip
    axis.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("demo-output/learning"))
    parser.add_argument("--run", nargs=2, metavar=("FRONT_END", "SEED"), help="only this one")
    parser.add_argument("--threads", type=int, help="threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    data = Notes.render(RECIPE)
    seconds = step_seconds(data, folder)
    print({name: f"{seconds[name]:.3f} s a step" for name in FRONT_ENDS}, flush=True)
    wanted = [("mulan", seed) for seed in arguments.seeds] + [("upstream", arguments.seeds[0])]
    if arguments.run:
        wanted = [(arguments.run[0], int(arguments.run[1]))]
    results = {
        f"{name}, {seed}": train(recipe(name, seed, seconds), data, folder / f"{name}-{seed}")
        for name, seed in wanted
    }
    text = table(results, seconds)
    print(text)
    if not arguments.run:
        plot(results, seconds, folder / "learning.png")
        facts = ", ".join(f"{k} {seconds[k]}" for k in seconds if k not in FRONT_ENDS)
        (folder / "learning.md").write_text(
            f"# What a MuLaN learns in minutes\n\n{described(data)}\n\n{text}\n\n"
            f"![accuracy against minutes](learning.png)\n\n{facts}\n"
        )


if __name__ == "__main__":
    main()
