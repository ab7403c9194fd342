"""The main job on real audio: a small MuLaN learns to name General MIDI instruments by sound.

Notes are rendered, captioned and split by pitch; the two towers are trained by contrast; the model
is then asked to name instruments at pitches it never heard, from texts it never read
(``zero-shot``: the label whose text lies nearest to the clip). Every random draw is a function of
the seed and the step, so a run that was stopped and resumed equals one that never was.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musiclm_fast._checkpoint import read_checkpoint, save_atomically
from musiclm_fast._checks import (
    check_choice,
    check_not_negative_int,
    check_positive,
    check_positive_int,
    fail,
)
from musiclm_fast._files import default_cache_folder
from musiclm_fast._progress import progress_bar
from musiclm_fast._signals import stop_requests
from musiclm_fast.demo.captioned_notes import CaptionedNotes
from musiclm_fast.demo.instruments import INSTRUMENTS, Instrument, zero_shot_prompts
from musiclm_fast.demo.pitches import split_by_pitch
from musiclm_fast.demo.rendering import NoteSet, render_notes
from musiclm_fast.evaluation.metrics import (
    collapsed_loss,
    embed_clips,
    label_latents,
    zero_shot_accuracy,
)
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.checkpoint import CheckpointError
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.text_tower import TextTransformer

MODEL_FILE, STATE_FILE, RESULTS_FILE = "mulan.pt", "training.pt", "results.json"


@dataclass(frozen=True)
class DemoConfig:
    """Everything that determines a run.

    Args:
        instruments: how many of the 128 programs, evenly spaced (2 to 128).
        steps: optimizer steps.
        batch_size: pairs per step; instruments are drawn without repetition as long as possible,
            since two clips of one instrument are no negatives of each other.
        dim, depth, text_depth, heads, dim_head, patch_size: of the towers.
        patch_dropout: share of patches dropped in training.
        front_end: ``"mulan"``, or ``"reference"`` for the reference's default front end with its
            own patches of 16 x 16.
        max_temperature: cap on the learned factor of the similarities, see :class:`MuLaN`.
        learning_rate, warmup_steps, weight_decay, max_grad_norm: AdamW with a linear warm-up and
            a cosine down to 2%.
        low, high, every, octave: MIDI pitches, see :func:`general_midi.split_by_pitch`.
        velocities: MIDI velocities of each note.
        clip_seconds: length of a note's clip.
        detune_cents: training notes are detuned by at most so many hundredths of a semitone.
        extra_words: training captions have at most so many random words at either end.
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
        check_choice("front_end", self.front_end, ("mulan", "reference"))
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
        # Standard normal embeddings, the default, hardly move at Adam's step sizes; small ones
        # learn words in two thirds of the steps.
        for embedding in (text.token_emb, text.pos_emb):
            torch.nn.init.normal_(embedding.weight, std=0.05)
        return MuLaN(audio, text, max_temperature=self.max_temperature)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


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


class _Batches:
    """Draws batches; the same step gives the same batch, whatever came before it."""

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


class DemoRun:
    """A training run that can be stopped at any moment and resumed.

    Args:
        config: the recipe.
        data: the notes.
        folder: where ``training.pt`` and everything else is written.
        device: where the model trains.
    """

    def __init__(self, config: DemoConfig, data: Notes, folder: Path, device: str = "cpu") -> None:
        self.config, self.data, self.folder, self.device = config, data, folder, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.mulan = config.build().to(device)
        matrices = [p for p in self.mulan.parameters() if p.ndim > 1]
        others = [p for p in self.mulan.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.batches = _Batches(data, config)
        self.step = 0
        self.seconds = 0.0  # spent in training steps, over all sittings
        self.losses: list[float] = []
        self.checks: list[tuple[int, float]] = []  # (step, top-1 at a sample of held-out pitches)

    @property
    def state_file(self) -> Path:
        """Where the run is saved."""
        return self.folder / STATE_FILE

    def save(self) -> None:
        """Write everything needed to go on, atomically."""
        save_atomically(
            self.state_file,
            {
                "config": plain_config(self.config),
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
                "checks": self.checks,
                "model": self.mulan.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def resume(self) -> bool:
        """Go on from the saved state, if there is one.

        Raises:
            CheckpointError: the saved run had another recipe, or its file is damaged.
        """
        if not self.state_file.exists():
            return False
        state = read_checkpoint(self.state_file)
        advice = "choose another --output, or --restart to train anew"
        saved, wanted = state.get("config"), plain_config(self.config)
        if saved != wanted:
            saved = saved if isinstance(saved, dict) else {}
            other = [
                f"{name} = {saved[name]!r}, not {value!r}"
                for name, value in wanted.items()
                if name in saved and saved[name] != value
            ]
            raise CheckpointError(
                f"output: {str(self.state_file)!r} is another run "
                f"({'; '.join(other) or 'no such configuration'}); {advice}"
            )
        try:
            self.mulan.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.losses, self.checks = list(state["losses"]), list(state["checks"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"output: {str(self.state_file)!r} cannot be resumed ({error}); {advice}"
            ) from error
        return True

    def train_step(self) -> float:
        """One optimizer step; returns the loss."""
        self.mulan.train()
        wavs, texts = self.batches.draw(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        devices = [torch.cuda.current_device()] if self.device == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # masks, patch dropout
            loss = self.mulan(wavs.to(self.device), raw_texts=texts)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.mulan.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def train(self, until: int | None = None, check_every: int | None = None) -> None:
        """Train to step ``until`` (default: the end), saving every two minutes and at the end.

        Every ``check_every`` steps (default: a twentieth of the run) the accuracy at a sample of
        the held-out pitches is measured, for the plot.

        Raises:
            KeyboardInterrupt: Ctrl-C (or SIGTERM) came; the step was finished and the run saved.
            FloatingPointError: the loss is not finite; the last saved state stays as it is.
        """
        until = self.config.steps if until is None else min(until, self.config.steps)
        check_every = check_every or max(1, self.config.steps // 20)
        baseline = f"{collapsed_loss(self.config.batch_size):.2f}"
        sample = np.random.default_rng(0).permutation(self.data.parts["held-out pitches"])[:256]
        saved_at = time.monotonic()
        bar = progress_bar(total=self.config.steps, initial=self.step, unit="step", desc="training")
        with bar, stop_requests() as stopped:
            while self.step < until and not stopped():
                began = time.monotonic()
                loss = self.train_step()
                self.seconds += time.monotonic() - began
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {self.step}")
                if self.step % check_every == 0:
                    self.checks.append((self.step, self._check(sample)))
                shown = {"loss": f"{loss:.2f}", f"ln{self.config.batch_size - 1}": baseline}
                if self.checks:
                    shown["unheard pitches"] = f"{self.checks[-1][1]:.0%}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
                if time.monotonic() - saved_at > 60:
                    self.save()
                    saved_at = time.monotonic()
            self.save()
            if stopped():
                raise KeyboardInterrupt

    def _check(self, clips: np.ndarray) -> float:
        prompts = label_latents(self.mulan, zero_shot_prompts(self.data.instruments))
        return self.data.accuracy(self.mulan, prompts, clips)[1]

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
