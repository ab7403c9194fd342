"""The demo's training: a small MuLaN learns to recognise General MIDI instruments.

Notes are rendered, captioned and split by pitch; the two towers are trained by contrastive
learning. The model is then evaluated by zero-shot classification (the label whose text is nearest
to the clip) at pitches and with texts that training did not use. Every random draw is a function
of the seed and the step, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checks import (
    check_choice,
    check_not_negative_int,
    check_positive,
    check_positive_int,
    fail,
)
from musiclm_fast._files import default_cache_folder
from musiclm_fast._progress import progress_bar
from musiclm_fast.demo.captioned_notes import CaptionedNotes
from musiclm_fast.demo.instruments import INSTRUMENTS, Instrument, zero_shot_prompts
from musiclm_fast.demo.pitches import split_by_pitch
from musiclm_fast.demo.rendering import NoteSet, render_notes
from musiclm_fast.evaluation.metrics import (
    embed_clips,
    label_latents,
    zero_shot_accuracy,
)
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.text_tower import TextTransformer
from musiclm_fast.training.mulan import MuLaNTrainer
from musiclm_fast.training.mulan_config import MuLaNTrainingConfig, MuLaNValidationConfig
from musiclm_fast.training.options import OptimizerConfig, RunOptions, ScheduleConfig
from musiclm_fast.training.run_log import Log

MODEL_FILE, RESULTS_FILE = "mulan.pt", "results.json"
TRAINING = "training"  # the folder of the run


@dataclass(frozen=True)
class DemoConfig:
    """Everything that determines a run.

    Args:
        instruments: how many of the 128 programs, evenly spaced (2 to 128).
        steps: optimizer steps.
        batch_size: pairs per step; instruments are drawn without repetition as long as possible,
            since two clips of one instrument are not negatives of each other.
        dim, depth, text_depth, heads, dim_head, patch_size: of the towers.
        patch_dropout: share of patches dropped in training.
        front_end: ``"mulan"``, or ``"upstream"`` for upstream's default front end with its
            own patches of 16 x 16.
        max_temperature: cap on the learned factor of the similarities, see :class:`MuLaN`.
        learning_rate, warmup_steps, weight_decay, max_grad_norm: AdamW with a linear warm-up and
            a cosine down to 2%.
        low, high, every, octave: MIDI pitches, see :func:`general_midi.split_by_pitch`.
        velocities: MIDI velocities of each note.
        clip_seconds: length of a note's clip.
        detune_cents: training notes are detuned by at most this many cents.
        extra_words: maximum number of random words before and after a training caption.
        seed: of everything.
    """

    instruments: int = 64
    steps: int = 1500
    batch_size: int = 64
    dim: int = 128
    depth: int = 2
    text_depth: int = 1
    heads: int = 4
    dim_head: int = 32
    patch_size: tuple[int, int] = (64, 16)
    patch_dropout: float = 0.0
    front_end: str = "mulan"
    max_temperature: float | None = 20.0
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    low: int = 36
    high: int = 95
    every: int = 4
    octave: int = 72
    velocities: tuple[int, ...] = (64, 112)
    clip_seconds: float = 1.0
    detune_cents: float = 40.0
    extra_words: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.instruments <= len(INSTRUMENTS):
            fail("instruments", self.instruments, f"2 to {len(INSTRUMENTS)}")
        if self.batch_size < 3:
            fail("batch_size", self.batch_size, "at least 3")
        for name in ("steps", "warmup_steps"):
            check_positive_int(name, getattr(self, name))
        check_choice("front_end", self.front_end, ("mulan", "upstream"))
        for name in ("learning_rate", "max_grad_norm", "clip_seconds"):
            check_positive(name, getattr(self, name))
        check_not_negative_int("extra_words", self.extra_words)

    def chosen(self) -> list[Instrument]:
        """The instruments, evenly spaced over the 128 programs."""
        count = self.instruments
        return [INSTRUMENTS[index * len(INSTRUMENTS) // count] for index in range(count)]

    def build(self) -> MuLaN:
        """The model."""
        audio = AudioSpectrogramTransformer(
            dim=self.dim,
            depth=self.depth,
            patch_size=self.patch_size if self.front_end == "mulan" else 16,
            heads=self.heads,
            dim_head=self.dim_head,
            patch_dropout_prob=self.patch_dropout,
            front_end=self.front_end,
        )
        text = TextTransformer(
            dim=self.dim,
            depth=self.text_depth,
            heads=self.heads,
            dim_head=self.dim_head,
            max_seq_len=64,
        )
        # Standard normal embeddings, the default, hardly change at Adam's step sizes; small
        # ones learn words in two thirds of the steps.
        for embedding in (text.token_emb, text.pos_emb):
            torch.nn.init.normal_(embedding.weight, std=0.05)
        return MuLaN(audio, text, max_temperature=self.max_temperature)

    def options(self, folder: Path) -> RunOptions:
        """The options of the training run, whose checkpoints are in ``folder``."""
        return RunOptions(
            OptimizerConfig(
                "adamw", self.learning_rate, (0.9, 0.98), weight_decay=self.weight_decay,
                decay_all_matrices=True, max_grad_norm=self.max_grad_norm,
            ),
            ScheduleConfig("cosine", self.warmup_steps, final=0.02),
            MuLaNTrainingConfig(
                str(folder), steps=self.steps, batch_size=self.batch_size, seed=self.seed,
                max_skipped_steps=1, save_every=250, keep_last=1, keep_best=0, log_every=1,
            ),
            MuLaNValidationConfig(every=max(1, self.steps // 20)),
        )  # fmt: skip


@dataclass
class Notes:
    """Rendered notes with their three parts.

    Args:
        instruments: the labels.
        notes: all clips.
        label: ``(n,)`` int64, index into instruments of each clip.
        parts: ``"train"``, ``"held-out pitches"`` and ``"held-out octave"``: indices of clips.
    """

    instruments: list[Instrument]
    notes: NoteSet
    label: Tensor
    parts: dict[str, np.ndarray]

    @classmethod
    def render(cls, config: DemoConfig, progress: bool = True) -> Notes:
        """Render (or read from the cache) and split."""
        split = split_by_pitch(config.low, config.high, config.every, config.octave)
        instruments = config.chosen()
        notes = render_notes(
            [item.program for item in instruments],
            range(config.low, config.high + 1),
            config.velocities,
            sample_rate=16_000,
            seconds=config.clip_seconds,
            cache_folder=default_cache_folder(),
            progress=(lambda it: progress_bar(it, desc="rendering instruments"))
            if progress
            else None,
        )
        index = {item.program: i for i, item in enumerate(instruments)}
        label = torch.tensor([index[program] for program in notes.program.tolist()])
        names = {
            "train": split.train,
            "held-out pitches": split.held_out,
            "held-out octave": split.octave,
        }
        parts = {k: np.flatnonzero(np.isin(notes.pitch, v)) for k, v in names.items()}
        return cls(instruments, notes, label, parts)

    def accuracy(self, mulan: MuLaN, prompts: Tensor, clips: np.ndarray) -> dict[int, float]:
        """Zero-shot accuracy, top 1 and top 5, of some clips."""
        audio = embed_clips(mulan, lambda part: self.notes.audio(clips[part]), len(clips))
        ks = [k for k in (1, 5) if k <= len(prompts)]
        return zero_shot_accuracy(audio, prompts, self.label[clips].to(audio.device), ks)


class Batches:
    """Draws batches; the batch is a function of the step."""

    def __init__(self, data: Notes, config: DemoConfig) -> None:
        self.config = config
        train = data.parts["train"]
        self.generator = torch.Generator()
        self.clips = CaptionedNotes(
            data.notes, data.instruments, indices=train, generator=self.generator,
            detune_cents=config.detune_cents, extra_words=config.extra_words,
        )  # fmt: skip
        labels = data.label[train].numpy()
        by_label = [np.flatnonzero(labels == i) for i in range(len(data.instruments))]
        # A soundfont may leave an instrument silent at all training pitches.
        self.by_label = [clips for clips in by_label if len(clips)]

    def draw(self, step: int) -> tuple[Tensor, list[str]]:
        """Clips ``(B, samples)`` and their captions."""
        self.generator.manual_seed(self.config.seed * 1_000_003 + step)
        rounds = -(-self.config.batch_size // len(self.by_label))
        order = [torch.randperm(len(self.by_label), generator=self.generator)] * rounds
        labels = torch.cat(order)[: self.config.batch_size].tolist()
        rows = []
        for label in labels:
            clips = self.by_label[label]
            pick = int(torch.randint(len(clips), (), generator=self.generator))
            rows.append(self.clips[int(clips[pick])])
        return torch.stack([wav for wav, _ in rows]), [text for _, text in rows]


class DemoTrainer(MuLaNTrainer):
    """Trains on batches of distinct instruments, and measures accuracy at held-out pitches.

    Args:
        config: the recipe.
        data: the notes.
        folder: of the checkpoints; an existing run is resumed.
        device: where the model trains.
    """

    shown = ("loss", "held-out pitches")
    advice = "choose another --output, or --restart to train anew"

    def __init__(self, config: DemoConfig, data: Notes, folder: Path, device: str) -> None:
        self.config, self.data, self.draws = config, data, Batches(data, config)
        held_out = data.parts["held-out pitches"]
        self.sample = np.random.default_rng(0).permutation(held_out)[:256]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            mulan = config.build()
        super().__init__(
            mulan, self.draws.clips, options=config.options(folder), resume=True,
            accelerate_kwargs={"cpu": device == "cpu"},
        )  # fmt: skip

    def split(self, dataset: Any, valid_dataset: Any) -> tuple[Any, Any]:
        """The notes are split by pitch."""
        return dataset, dataset

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        """Batches from step ``start`` on."""
        for step in itertools.count(start):
            wavs, texts = self.draws.draw(step)
            yield {"wavs": wavs, "raw_texts": texts}

    def backward(self, inputs: dict[str, Any], share: float) -> Tensor:
        """Add the gradients; masks and dropped patches are a function of the seed and the step."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)
            return super().backward(inputs, share)

    def measure(self) -> Log:
        """Accuracy at a sample of the held-out pitches."""
        mulan = self.evaluated
        prompts = label_latents(mulan, zero_shot_prompts(self.data.instruments))
        return {"held-out pitches": self.data.accuracy(mulan, prompts, self.sample)[1]}

    def facts(self) -> dict[str, Any]:
        """The recipe."""
        return plain_config(self.config)


class DemoRun:
    """A training run that can be stopped at any moment and resumed.

    Args:
        config: the recipe.
        data: the notes.
        folder: output folder; checkpoints and the log are in its ``training/``.
        device: where the model trains.

    Raises:
        CheckpointError: the folder holds a run of another recipe, or a damaged run.
    """

    def __init__(self, config: DemoConfig, data: Notes, folder: Path, device: str = "cpu") -> None:
        self.config, self.data, self.folder = config, data, folder
        self.trainer = DemoTrainer(config, data, folder / TRAINING, device)
        self.device = self.trainer.device

    @property
    def mulan(self) -> MuLaN:
        """The model."""
        return cast(MuLaN, self.trainer.unwrapped)

    def log(self, name: str) -> list[tuple[int, float]]:
        """``(step, value)`` of each line of the log that has ``name``."""
        lines = self.trainer.run.read_log()
        return [(line["step"], line[name]) for line in lines if name in line]

    def train(self, until: int | None = None) -> None:
        """Train to step ``until`` (default: the end); see :meth:`.engine.Engine.train`."""
        steps = self.config.steps
        self.trainer.num_train_steps = steps if until is None else min(until, steps)
        self.trainer.train()

    def evaluate(self) -> dict[str, dict[int, float]]:
        """Zero-shot accuracy of each part: ``{part: {1: top-1, 5: top-5}}``."""
        prompts = label_latents(self.mulan, zero_shot_prompts(self.data.instruments))
        parts = self.data.parts
        return {k: self.data.accuracy(self.mulan, prompts, clips) for k, clips in parts.items()}

    def similarity_matrix(self, clips: np.ndarray) -> Tensor:
        """Mean similarity of each instrument's clips (rows) to each instrument's text (columns)."""
        prompts = label_latents(self.mulan, zero_shot_prompts(self.data.instruments))
        audio = embed_clips(self.mulan, lambda part: self.data.notes.audio(clips[part]), len(clips))
        count = len(prompts)
        rows = torch.zeros(count, count, device=audio.device)
        label = self.data.label[clips].to(audio.device)
        rows.index_add_(0, label, audio @ prompts.t())
        return (rows / torch.bincount(label, minlength=count).clamp(min=1)[:, None]).cpu()


def plain_config(config: DemoConfig) -> dict[str, Any]:
    """The configuration as JSON has it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
