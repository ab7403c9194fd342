"""``musiclm-fast demo-music``: fit, train, generate, classify and draw."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._files import write_json
from musiclm_fast._optional import require
from musiclm_fast._progress import progress_bar
from musiclm_fast._signals import stop_requests
from musiclm_fast._tables import aligned
from musiclm_fast._wording import plural
from musiclm_fast.audio.writing import write_wave
from musiclm_fast.audiolm.audio_lm import STAGES
from musiclm_fast.demo.music_run import RESULTS_FILE, MusicDemo, MusicDemoConfig
from musiclm_fast.evaluation.instrument_classifier import nearest_clip
from musiclm_fast.models.checkpoint import CheckpointError
from musiclm_fast.musiclm.project import PARTS, MusicProject
from musiclm_fast.training.run_folder import RunFolder, stage_form

# Earlier names of fields in results.json.
_RENAMED = {"phrases": "melodies", "judged_phrases": "known_melodies"}


def plain_recipe(config: MusicDemoConfig) -> dict[str, Any]:
    """The configuration as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _scores(ranks: Tensor, distances: Tensor) -> dict[str, float]:
    return {
        "count": len(ranks),
        "top-1": (ranks <= 1).double().mean().item(),
        "top-5": (ranks <= 5).double().mean().item(),
        "nearest training clip, dB": distances.median().item(),
    }


def classifier_table(rows: Sequence[Mapping[str, Any]], instruments: int) -> str:
    """The classifier's results as text, with chance."""
    title = f"classified among {plural(instruments, 'instrument')}"
    lines: list[tuple[str, ...]] = [(title, "clips", "top-1", "top-5", "nearest training clip")]
    for row in rows:
        shares = (f"{row[k]:.1%}" for k in ("top-1", "top-5"))
        distance = f"{row['nearest training clip, dB']:.1f} dB"
        lines.append((row["clips"], str(row["count"]), *shares, distance))
    chance = (f"{k / instruments:.1%}" for k in (1, 5))
    return aligned([*lines, ("chance", "", *chance, "")])


def run_music_demo(
    folder: str | os.PathLike[str],
    config: MusicDemoConfig | None = None,
    *,
    checkpoint: str | os.PathLike[str],
    restart: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fit, train (or resume), generate, classify, and write everything to ``folder``.

    Files: ``parts.pt`` and one file per stage, which ``musiclm-fast generate --music`` takes;
    ``generated/`` with a wav file for every prompt; for eight of them ``NAME.wav`` and
    ``NAME.png``, its spectrogram below that of a real melody; ``results.json``.

    Args:
        folder: of the output.
        config: the recipe.
        checkpoint: the MuLaN that ``musiclm-fast demo`` wrote.
        restart: discard a run in the folder.
        say: receives progress messages.

    Returns:
        What ``results.json`` holds.

    Raises:
        KeyboardInterrupt: stopped; the same call resumes.
        FileNotFoundError, CheckpointError: see :class:`MusicDemo`.
    """
    began = time.monotonic()
    config = config or MusicDemoConfig()
    for package in ("matplotlib", "soundfile"):  # needed only after training
        require(package)
    folder = Path(folder)
    demo = MusicDemo(config, folder, Path(checkpoint))
    results = _open_results(folder, config, restart)
    say(
        f"{plural(len(demo.train), 'melody', 'melodies')} of {config.seconds:g} s to train on, "
        f"{plural(config.instruments, 'instrument')} ({time.monotonic() - began:.0f} s)"
    )
    project = demo.project(say)
    steps = {name: getattr(config, f"{name}_steps") for name in STAGES}
    for name in STAGES:
        if name in results["stages"]:
            continue
        log = project.train(
            name, demo.train, demo.rate, steps[name], config.batch_size,
            lr=config.learning_rate, random_split_seed=config.seed, accelerate_kwargs={"cpu": True},
        )  # fmt: skip
        results["stages"][name] = log
        write_json(folder / RESULTS_FILE, results)
        say(
            f"{name} stage: loss {log['loss']:.3f}, on held-out melodies {log['valid_loss']:.3f} "
            f"({log['seconds']:.0f} s in this session)"
        )
    waves = _generate(demo, project)

    classifier = demo.classifier()
    trained = demo.train.audio()
    labels = torch.arange(config.instruments)
    generator = torch.Generator().manual_seed(config.seed)
    some = torch.randperm(len(trained), generator=generator)[: len(demo.new)]
    trained_labels = torch.from_numpy(demo.train.label)[some]
    rows = [(f"generated, {plural(config.instruments, 'prompt')}", waves, labels)]
    for name, real in (
        ("real, melodies not trained on", demo.new),
        ("real, pitches not trained on", demo.held_out),
    ):
        clips, of = real.audio(), torch.from_numpy(real.label)
        rows.append((name, clips, of))
        rows.append(
            ("the same through the codec: a ceiling", demo.through_codec(project, clips), of)
        )
    replayed = demo.through_codec(project, trained[some])
    rows.append(("training melodies through the codec", replayed, trained_labels))
    results["classifier"] = [
        {
            "clips": name,
            **_scores(classifier.ranks(clips, right), nearest_clip(clips, trained, demo.rate)),
        }
        for name, clips, right in rows
    ]
    results["chance"] = {"top-1": 1 / config.instruments, "top-5": 5 / config.instruments}
    ranks = classifier.ranks(waves, labels).tolist()
    results["prompts"] = {
        text: {"rank": rank, "instrument": item.name}
        for text, rank, item in zip(demo.prompts(), ranks, demo.instruments, strict=True)
    }
    results.update(threads=torch.get_num_threads(), torch=torch.__version__)
    write_json(folder / RESULTS_FILE, results)

    from musiclm_fast.demo import music_figures

    written = music_figures.write_all(demo, waves, ranks)
    say("")
    say(classifier_table(results["classifier"], config.instruments))
    say("")
    say(f"wrote to {folder}/: {RESULTS_FILE}, generated/, {', '.join(p.name for p in written)}")
    say(f'try: musiclm-fast generate "{demo.prompts()[0]}" --music {folder} '
        f"--seconds {config.seconds:g} --num-samples 4 -o music.wav")  # fmt: skip
    return results


def _open_results(folder: Path, config: MusicDemoConfig, restart: bool) -> dict[str, Any]:
    # The results so far, or new ones; an error where they are another recipe's.
    path = folder / RESULTS_FILE
    recipe = plain_recipe(config)
    names = [PARTS, RESULTS_FILE, *(f"{name}.pt" for name in STAGES)]
    if restart:
        for old in [*(folder / name for name in names), *folder.glob("generated/*.wav")]:
            old.unlink(missing_ok=True)
        for name in STAGES:
            RunFolder(folder / name, stage_form(name)).clear()
    if path.is_file():
        try:
            results: dict[str, Any] = json.loads(path.read_text())
            saved, _ = results["config"], results["stages"]
            saved = {_RENAMED.get(name, name): value for name, value in saved.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"output: {str(path)!r} is damaged ({error!r}); --restart trains anew"
            ) from error
        if saved != recipe:
            other = [k for k in recipe if saved.get(k) != recipe[k]]
            raise CheckpointError(
                f"output: {str(path)!r} is another run (another {', '.join(other)}); choose "
                "another --output, or --restart to train anew"
            )
        results["config"] = recipe
        results.pop("judge", None)  # the classifier's results by their earlier name
        return results
    held = [name for name in names if (folder / name).exists()]
    if held:
        raise CheckpointError(
            f"output: {str(folder)!r} holds {', '.join(held)} of something else; choose another "
            "--output, or --restart to replace them"
        )
    results = {"config": recipe, "stages": {}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    return results


def _generate(demo: MusicDemo, project: MusicProject) -> Tensor:
    # One clip (prompts, samples) per prompt, from generated/ where it exists.
    soundfile = require("soundfile")

    config, clips = demo.config, []
    model = None
    prompts = list(zip(demo.prompts(), demo.instruments, strict=True))
    with stop_requests() as stopped:
        for index, (text, item) in enumerate(progress_bar(prompts, desc="generating")):
            if stopped():
                raise KeyboardInterrupt
            path = demo.folder / "generated" / f"{index:02d}-{item.name.replace(' ', '-')}.wav"
            if not path.is_file():
                model = model or project.musiclm()
                samples = model(
                    text, config.num_samples, return_all=True, seconds=config.seconds,
                    seed=config.seed + 1000 * index, sampling=demo.config.sampling(),
                    progress=False,
                )  # fmt: skip
                wave = samples[0].wave
                if wave is None:  # every sample ended at once: silence, which is classified too
                    wave = torch.zeros(1, demo.rate // 10)
                write_wave(path, wave, project.codec.target_sample_hz)
            read, _ = soundfile.read(path, dtype="float32")
            clips.append(demo.padded(torch.from_numpy(read)[None]))
    return torch.cat(clips)
