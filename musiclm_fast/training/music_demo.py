"""From the demo's MuLaN to sound: three small stages learn melodies of 32 instruments, and play.

Tokenizer, codec and quantizer are fitted to melodies of rendered notes, the three stages trained
on them. Then each instrument is asked for in a text that training never read, and an independent
judge, which knows log-mel statistics of real clips and nothing of MuLaN, says what it hears. What
the same judge makes of real clips, and of real clips through the codec alone, stands beside it,
and so does each clip's distance to the nearest training clip.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from musiclm_fast._checks import check_positive, check_positive_int, fail
from musiclm_fast._optional import require
from musiclm_fast.audiolm.audio_lm import STAGES
from musiclm_fast.audiolm.sampling import Sampling
from musiclm_fast.training.checkpoint import CheckpointError, load_mulan
from musiclm_fast.training.demo import DemoConfig, Notes
from musiclm_fast.training.general_midi import (
    PROMPT_TEMPLATES,
    Instrument,
    split_by_pitch,
    zero_shot_prompts,
)
from musiclm_fast.training.judge import InstrumentJudge, nearest_clip
from musiclm_fast.training.music import PARTS, MusicConfig, MusicProject, write_wave
from musiclm_fast.training.phrases import Phrases, compose_phrases
from musiclm_fast.training.progress import progress_bar
from musiclm_fast.training.stopping import stop_requests

RESULTS_FILE = "results.json"
_CALIBRATION = 4  # real melodies per instrument that calibrate the judge
_SEMANTIC = Sampling(temperature=0.8, cond_scale=2.0)
_COARSE = Sampling(temperature=0.5, cond_scale=2.0)
_FINE = Sampling(temperature=0.4, cond_scale=1.0)


@dataclass(frozen=True)
class MusicDemoConfig:
    """Everything that determines a run.

    Args:
        instruments: how many of those that the MuLaN knows, evenly spaced. Half of the demo's 64:
            the judge tells 32 apart, and each of them is trained on twice as often.
        phrases: training melodies per instrument.
        judged_phrases: melodies per instrument that the judge knows; none is a training melody.
        seconds: length of a melody.
        sizes: of the stages, tokenizer, codec and quantizer.
        semantic_steps, coarse_steps, fine_steps: optimizer steps of each stage.
        batch_size, learning_rate: of all stages.
        semantic_sampling, coarse_sampling, fine_sampling: how each stage's tokens are drawn.
        num_samples: drawn for each prompt; MuLaN's favourite counts.
        seed: of everything.
    """

    instruments: int = 32
    phrases: int = 128
    judged_phrases: int = 48
    seconds: float = 2.0
    sizes: MusicConfig = field(
        default_factory=lambda: MusicConfig(
            dim=128, depth=3, heads=2, residual_streams=1, codebook_size=512, codec_hop=512,
            condition_quantizers=1, condition_codes=64, window_seconds=1.0,
        )
    )  # fmt: skip
    semantic_steps: int = 1200
    coarse_steps: int = 1000
    fine_steps: int = 500
    batch_size: int = 16
    learning_rate: float = 2e-3
    semantic_sampling: Sampling = _SEMANTIC
    coarse_sampling: Sampling = _COARSE
    fine_sampling: Sampling = _FINE
    num_samples: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.instruments < 6:
            fail("instruments", self.instruments, "at least 6: five of them are the judge's best")
        for name in ("phrases", "judged_phrases", "batch_size", "num_samples"):
            check_positive_int(name, getattr(self, name))
        for name in STAGES:
            check_positive_int(f"{name}_steps", getattr(self, f"{name}_steps"))
        check_positive("seconds", self.seconds)
        check_positive("learning_rate", self.learning_rate)

    def sampling(self) -> dict[str, Sampling]:
        """Each stage's sampling, by name."""
        return {name: getattr(self, f"{name}_sampling") for name in STAGES}


class MusicDemo:
    """The demo's data, model and judge, in a folder.

    Args:
        config: the recipe.
        folder: where everything is written.
        checkpoint: the MuLaN, as ``musiclm-fast demo`` writes it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is none of the demo's, or the folder is another run's.
    """

    def __init__(self, config: MusicDemoConfig, folder: Path, checkpoint: str | Path) -> None:
        self.config, self.folder = config, folder
        mulan, extra = load_mulan(checkpoint)
        known = DemoConfig(instruments=len(extra.get("labels", ())) or 64)
        if extra.get("labels") != [item.name for item in known.chosen()]:
            raise CheckpointError(
                f"checkpoint: {str(checkpoint)!r} is not of `musiclm-fast demo`, which names its "
                "instruments"
            )
        if config.instruments > known.instruments:
            fail("instruments", config.instruments, f"at most the MuLaN's {known.instruments}")
        self.mulan = mulan
        data = Notes.render(known)
        count = config.instruments
        chosen = [i * known.instruments // count for i in range(count)]
        self.instruments: list[Instrument] = [data.instruments[i] for i in chosen]
        programs = [item.program for item in self.instruments]
        split = split_by_pitch(known.low, known.high, known.every, known.octave)

        def compose(pitches: tuple[int, ...], per: int, seed: int, scale: bool) -> Phrases:
            return compose_phrases(
                data.notes, programs, pitches, per, config.seconds, 4 * config.seed + seed, scale
            )

        self.train = compose(split.train, config.phrases, 0, True)
        self.known = compose(split.train, config.judged_phrases, 1, True)
        self.new = compose(split.train, _CALIBRATION, 2, True)
        # The pitches between the training pitches are four semitones apart: no scale holds them.
        self.held_out = compose(split.held_out, _CALIBRATION, 3, False)
        self.rate = self.train.sample_rate

    def prompts(self) -> list[str]:
        """One text per instrument, in forms that no training caption has, taken in turn."""
        texts = zero_shot_prompts(self.instruments, PROMPT_TEMPLATES)
        return [forms[i % len(forms)] for i, forms in enumerate(texts)]

    def project(self, say: Callable[[str], None]) -> MusicProject:
        """The fitted project, from the folder or new.

        Raises:
            CheckpointError: the folder's project has other sizes or another MuLaN.
        """
        if not (self.folder / PARTS).is_file():
            began = time.monotonic()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)  # of the conditioning embeddings
                project = MusicProject(self.folder, self.mulan, self.config.sizes)
            order = np.random.default_rng(self.config.seed).permutation(len(self.train))
            project.fit(Subset(self.train, order.tolist()), self.rate)
            say(f"fitted tokenizer, codec and quantizer ({time.monotonic() - began:.0f} s)")
            return project
        project = MusicProject(self.folder)
        same = all(
            torch.equal(value, project.quantizer.mulan.state_dict()[name])
            for name, value in self.mulan.state_dict().items()
        )
        if project.config != self.config.sizes or not same:
            other = "another MuLaN" if project.config == self.config.sizes else "other sizes"
            raise CheckpointError(
                f"output: {str(self.folder)!r} is a run with {other}; choose another --output, "
                "or --restart to train anew"
            )
        return project

    def judge(self) -> InstrumentJudge:
        """The judge, who knows real melodies of the training pitches."""
        return InstrumentJudge(self.known.audio(), torch.from_numpy(self.known.label), self.rate)

    def padded(self, clips: Tensor) -> Tensor:
        """Clips ``(B, samples)`` as long as a training clip: cut, or silent at the end."""
        length = self.train.pcm.shape[1]
        return F.pad(clips, (0, max(0, length - clips.shape[1])))[:, :length]

    def through_codec(self, project: MusicProject, clips: Tensor) -> Tensor:
        """Clips ``(B, samples)`` encoded and decoded again: the best that stages could write."""
        parts = []
        for some in clips.split(64):
            _, ids, _ = project.codec(some, input_sample_hz=self.rate)
            parts.append(self.padded(project.codec.decode_from_codebook_indices(ids)[:, 0]))
        return torch.cat(parts)


def _recipe(config: MusicDemoConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _judged(ranks: Tensor, distances: Tensor) -> dict[str, float]:
    return {
        "count": len(ranks),
        "top-1": (ranks <= 1).double().mean().item(),
        "top-5": (ranks <= 5).double().mean().item(),
        "nearest training clip, dB": distances.median().item(),
    }


def judge_table(rows: Sequence[Mapping[str, Any]], instruments: int) -> str:
    """The judge's results as text, with chance."""
    lines = [
        f"{'the judge hears, of ' + str(instruments) + ' instruments':<42}{'clips':>6}{'top-1':>8}"
        f"{'top-5':>8}{'nearest training clip':>24}"
    ]
    for row in rows:
        lines.append(
            f"{row['clips']:<42}{row['count']:>6}{row['top-1']:>8.1%}{row['top-5']:>8.1%}"
            f"{row['nearest training clip, dB']:>21.1f} dB"
        )
    lines.append(f"{'chance':<42}{'':>6}{1 / instruments:>8.1%}{5 / instruments:>8.1%}")
    return "\n".join(lines)


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def run_music_demo(
    folder: str | os.PathLike[str],
    config: MusicDemoConfig | None = None,
    *,
    checkpoint: str | os.PathLike[str],
    restart: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fit, train (or go on), generate, judge, and write everything to ``folder``.

    Files: ``parts.pt`` and one file per stage, which ``musiclm-fast generate --music`` takes;
    ``generated/`` with a wav file for every prompt; for eight of them ``NAME.wav`` and
    ``NAME.png``, its spectrogram under that of a real melody; ``results.json``.

    Args:
        folder: of the output.
        config: the recipe.
        checkpoint: the MuLaN that ``musiclm-fast demo`` wrote.
        restart: begin anew where a run lies in the folder.
        say: receives progress messages.

    Returns:
        What ``results.json`` holds.

    Raises:
        KeyboardInterrupt: stopped; the same call goes on from there.
        FileNotFoundError, CheckpointError: see :class:`MusicDemo`.
    """
    began = time.monotonic()
    config = config or MusicDemoConfig()
    for package in ("matplotlib", "soundfile"):  # needed only once the training is done
        require(package)
    folder = Path(folder)
    demo = MusicDemo(config, folder, Path(checkpoint))
    results = _open_results(folder, config, restart)
    say(
        f"{len(demo.train)} melodies of {config.seconds:g} s to train on, "
        f"{config.instruments} instruments ({time.monotonic() - began:.0f} s)"
    )
    project = demo.project(say)
    steps = {name: getattr(config, f"{name}_steps") for name in STAGES}
    for name in STAGES:
        if name in results["stages"]:
            continue
        log = project.train(
            name, demo.train, demo.rate, steps[name], config.batch_size,
            learning_rate=config.learning_rate, seed=config.seed, accelerate_kwargs={"cpu": True},
        )  # fmt: skip
        results["stages"][name] = log
        _write_json(folder / RESULTS_FILE, results)
        say(
            f"{name} stage: loss {log['loss']:.3f}, at melodies held out {log['valid_loss']:.3f} "
            f"({log['seconds']:.0f} s in this sitting)"
        )
    waves = _generate(demo, project)

    judge = demo.judge()
    trained = demo.train.audio()
    labels = torch.arange(config.instruments)
    generator = torch.Generator().manual_seed(config.seed)
    some = torch.randperm(len(trained), generator=generator)[: len(demo.new)]
    trained_labels = torch.from_numpy(demo.train.label)[some]
    rows = [(f"generated, {config.instruments} prompts", waves, labels)]
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
    results["judge"] = [
        {
            "clips": name,
            **_judged(judge.ranks(clips, right), nearest_clip(clips, trained, demo.rate)),
        }
        for name, clips, right in rows
    ]
    results["chance"] = {"top-1": 1 / config.instruments, "top-5": 5 / config.instruments}
    ranks = judge.ranks(waves, labels).tolist()
    results["prompts"] = {
        text: {"rank": rank, "instrument": item.name}
        for text, rank, item in zip(demo.prompts(), ranks, demo.instruments, strict=True)
    }
    results.update(threads=torch.get_num_threads(), torch=torch.__version__)
    _write_json(folder / RESULTS_FILE, results)

    from musiclm_fast.training import music_figures

    written = music_figures.write_all(demo, waves, ranks)
    say("")
    say(judge_table(results["judge"], config.instruments))
    say("")
    say(f"wrote to {folder}/: {RESULTS_FILE}, generated/, {', '.join(p.name for p in written)}")
    say(f'try: musiclm-fast generate "{demo.prompts()[0]}" --music {folder} '
        f"--seconds {config.seconds:g} --num-samples 4 -o music.wav")  # fmt: skip
    return results


def _open_results(folder: Path, config: MusicDemoConfig, restart: bool) -> dict[str, Any]:
    # The results so far, or new ones; an error where they are another recipe's.
    path = folder / RESULTS_FILE
    recipe = _recipe(config)
    names = [PARTS, RESULTS_FILE, *(f"{name}.pt" for name in STAGES)]
    if restart:
        for old in [*(folder / name for name in names), *folder.glob("generated/*.wav")]:
            old.unlink(missing_ok=True)
    if path.is_file():
        try:
            results: dict[str, Any] = json.loads(path.read_text())
            saved, _ = results["config"], results["stages"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"output: {str(path)!r} is damaged ({error!r}); --restart trains anew"
            ) from error
        if saved != recipe:
            other = [k for k in recipe if not isinstance(saved, dict) or saved.get(k) != recipe[k]]
            raise CheckpointError(
                f"output: {str(path)!r} is another run (another {', '.join(other)}); choose "
                "another --output, or --restart to train anew"
            )
        return results
    held = [name for name in names if (folder / name).exists()]
    if held:
        raise CheckpointError(
            f"output: {str(folder)!r} holds {', '.join(held)} of something else; choose another "
            "--output, or --restart to replace them"
        )
    results = {"config": recipe, "stages": {}}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, results)
    return results


def _generate(demo: MusicDemo, project: MusicProject) -> Tensor:
    # One clip (prompts, samples) per prompt, from generated/ where it lies there already.
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
                if wave is None:  # every sample ended at once: silence, which the judge judges
                    wave = torch.zeros(1, demo.rate // 10)
                write_wave(path, wave, project.codec.target_sample_hz)
            read, _ = soundfile.read(path, dtype="float32")
            clips.append(demo.padded(torch.from_numpy(read)[None]))
    return torch.cat(clips)
