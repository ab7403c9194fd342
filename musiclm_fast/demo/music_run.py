"""From the demo's MuLaN to sound: three small stages learn melodies of 32 instruments.

Tokenizer, codec and quantizer are fitted to melodies of rendered notes, and the three stages are
trained on them. The stages then generate a clip for each instrument from a text that training did
not use. An independent classifier, based on log-mel statistics of real clips and not on MuLaN,
names the instrument of each clip. For comparison it also classifies real clips and real clips
through the codec alone. Each clip's distance to the nearest training clip is reported too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Subset

from musiclm_fast._checks import check_positive, check_positive_int, fail
from musiclm_fast.audiolm.audio_lm import STAGES
from musiclm_fast.audiolm.sampling import Sampling
from musiclm_fast.demo.instruments import PROMPT_TEMPLATES, Instrument, zero_shot_prompts
from musiclm_fast.demo.melodies import MelodyDataset, compose_melodies
from musiclm_fast.demo.mulan_run import DemoConfig, Notes
from musiclm_fast.demo.pitches import split_by_pitch
from musiclm_fast.evaluation.instrument_classifier import InstrumentClassifier
from musiclm_fast.models.checkpoint import CheckpointError, load_mulan
from musiclm_fast.musiclm.project import PARTS, MusicConfig, MusicProject

RESULTS_FILE = "results.json"


_CALIBRATION = 4  # real melodies per instrument, for comparison


_SEMANTIC = Sampling(temperature=0.8, cond_scale=2.0)


_COARSE = Sampling(temperature=0.5, cond_scale=2.0)


_FINE = Sampling(temperature=0.4, cond_scale=1.0)


@dataclass(frozen=True)
class MusicDemoConfig:
    """Everything that determines a run.

    Args:
        instruments: how many of those that the MuLaN knows, evenly spaced. Half of the demo's 64:
            the classifier can tell 32 apart, and each gets twice the training steps.
        melodies: training melodies per instrument.
        known_melodies: the classifier's melodies per instrument; none is a training melody.
        seconds: length of a melody.
        sizes: of the stages, tokenizer, codec and quantizer.
        semantic_steps, coarse_steps, fine_steps: optimizer steps of each stage.
        batch_size, learning_rate: of all stages.
        semantic_sampling, coarse_sampling, fine_sampling: how each stage's tokens are drawn.
        num_samples: drawn for each prompt; the one that MuLaN ranks first counts.
        seed: of everything.
    """

    instruments: int = 32
    melodies: int = 128
    known_melodies: int = 48
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
            fail("instruments", self.instruments, "at least 6: top-5 accuracy is reported")
        for name in ("melodies", "known_melodies", "batch_size", "num_samples"):
            check_positive_int(name, getattr(self, name))
        for name in STAGES:
            check_positive_int(f"{name}_steps", getattr(self, f"{name}_steps"))
        check_positive("seconds", self.seconds)
        check_positive("learning_rate", self.learning_rate)

    def sampling(self) -> dict[str, Sampling]:
        """Each stage's sampling, by name."""
        return {name: getattr(self, f"{name}_sampling") for name in STAGES}


class MusicDemo:
    """The demo's data, model and classifier, in a folder.

    Args:
        config: the recipe.
        folder: where everything is written.
        checkpoint: the MuLaN, as ``musiclm-fast demo`` writes it.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the checkpoint is not the demo's, or the folder holds another run.
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

        def compose(pitches: tuple[int, ...], per: int, seed: int, scale: bool) -> MelodyDataset:
            return compose_melodies(
                data.notes, programs, pitches, per, config.seconds, 4 * config.seed + seed, scale
            )

        self.train = compose(split.train, config.melodies, 0, True)
        self.known = compose(split.train, config.known_melodies, 1, True)
        self.new = compose(split.train, _CALIBRATION, 2, True)
        # The held-out pitches are four semitones apart: no scale contains them.
        self.held_out = compose(split.held_out, _CALIBRATION, 3, False)
        self.rate = self.train.sample_rate

    def prompts(self) -> list[str]:
        """One text per instrument; the forms, which no training caption has, alternate."""
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

    def classifier(self) -> InstrumentClassifier:
        """The instrument classifier, with real melodies at the training pitches."""
        labels = torch.from_numpy(self.known.label)
        return InstrumentClassifier(self.known.audio(), labels, self.rate)

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
