"""From a MuLaN to music: fits tokenizer, codec and quantizer, trains the stages, generates.

All of it lives in one folder: ``parts.pt`` holds the sizes, tokenizer, codec and quantizer,
``semantic.pt``, ``coarse.pt`` and ``fine.pt`` the stages. Everything is read weights-only.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast._checkpoint import CheckpointError, read_checkpoint, save_atomically
from musiclm_fast._checks import check_choice, check_positive, check_positive_int, fail
from musiclm_fast._progress import progress_bar
from musiclm_fast._signals import stop_requests
from musiclm_fast.audiolm.audio_lm import STAGES, AudioLM
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.mel_codec import MelCodec
from musiclm_fast.audiolm.mel_kmeans import MelKmeans
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.models.configuration import mulan_config
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.quantizer import MuLaNEmbedQuantizer
from musiclm_fast.musiclm.musiclm import MusicLM
from musiclm_fast.training.stages import (
    CoarseTransformerTrainer,
    FineTransformerTrainer,
    SemanticTransformerTrainer,
)

PARTS = "parts.pt"


@dataclass(frozen=True)
class MusicConfig:
    """Sizes of a small MusicLM.

    Args:
        dim, depth, heads: of each stage.
        residual_streams: of the stages' hyper-connections; 1 is a plain residual, and faster.
        semantic_tokens: clusters of the semantic tokenizer.
        semantic_hop: samples at 16 kHz per semantic token.
        codebook_size: entries of each of the codec's codebooks.
        codec_hop: samples at 16 kHz per time step of the codec.
        codec_bands: mel bands of the codec; more rebuild better, fewer are easier to learn.
        coarse_quantizers, fine_quantizers: how many the two stages write.
        condition_quantizers, condition_codes: codebooks of the quantizer of MuLaN's embeddings.
        window_seconds: MuLaN hears longer clips in windows of this length, every half of it; 0
            for as a whole.
    """

    dim: int = 256
    depth: int = 4
    heads: int = 4
    residual_streams: int = 4
    semantic_tokens: int = 128
    semantic_hop: int = 640
    codebook_size: int = 256
    codec_hop: int = 320
    codec_bands: int = 64
    coarse_quantizers: int = 2
    fine_quantizers: int = 2
    condition_quantizers: int = 8
    condition_codes: int = 64
    window_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "window_seconds":
                check_positive_int(name, value)
        if not 0 <= self.window_seconds < math.inf:
            fail("window_seconds", self.window_seconds, "0 or a number of seconds")


class MusicProject:
    """A MusicLM in the making, in a folder.

    Args:
        folder: where everything is.
        mulan: a trained MuLaN, for a new project; None opens what the folder holds.
        config: sizes of a new project.

    Raises:
        FileNotFoundError: nothing to open.
        CheckpointError: the folder's files are not a project's.
    """

    def __init__(
        self, folder: str | Path, mulan: MuLaN | None = None, config: MusicConfig | None = None
    ) -> None:
        self.folder = Path(folder)
        state: dict[str, Any] = {}
        if mulan is None:
            state = read_checkpoint(self.folder / PARTS)
            try:
                mulan, config = MuLaN.from_config(state["mulan"]), MusicConfig(**state["config"])
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{self.folder / PARTS} is no project's: {error}") from error
        c = self.config = config or MusicConfig()
        self.tokenizer = MelKmeans(c.semantic_tokens, downsample_factor=c.semantic_hop)
        self.codec = MelCodec(
            c.coarse_quantizers + c.fine_quantizers, c.codebook_size,
            downsample_factor=c.codec_hop, bands=c.codec_bands,
        )  # fmt: skip
        window = c.window_seconds or None
        self.quantizer = MuLaNEmbedQuantizer(
            mulan.eval(), (c.dim,) * 3,
            rq_num_quantizers=c.condition_quantizers, codebook_size=c.condition_codes,
            window_seconds=window, window_stride_seconds=(window or 2.0) / 2,
        )  # fmt: skip
        if state:
            for name in ("tokenizer", "codec", "quantizer"):
                getattr(self, name).load_state_dict(state[name])
            self.quantizer.freeze()

    def fit(self, clips: Any, sample_hz: int, progress: bool = True) -> None:
        """Fit tokenizer, codec and quantizer to clips, a sequence of ``(samples,)``; write them."""
        self.tokenizer.fit(clips, input_sample_hz=sample_hz)
        self.codec.fit(clips, input_sample_hz=sample_hz)
        heard = self.quantizer.sample_hz
        self.quantizer.fit(
            clips, input_sample_hz=None if heard is None else sample_hz, progress=progress
        )
        save_atomically(
            self.folder / PARTS,
            {
                "mulan": mulan_config(self.quantizer.mulan),
                "config": asdict(self.config),
                "tokenizer": self.tokenizer.state_dict(),
                "codec": self.codec.state_dict(),
                "quantizer": self.quantizer.state_dict(),
            },
        )

    def stage(self, name: str) -> Any:
        """A stage with fresh weights."""
        check_choice("stage", name, STAGES)
        c = self.config
        shared: dict[str, Any] = dict(
            dim=c.dim, depth=c.depth, heads=c.heads, audio_text_condition=True,
            cond_drop_prob=0.1, num_residual_streams=c.residual_streams,
        )  # fmt: skip
        acoustic: dict[str, Any] = dict(
            codebook_size=c.codebook_size, num_coarse_quantizers=c.coarse_quantizers
        )
        stage: Any
        if name == "semantic":
            stage = SemanticTransformer(
                **shared, num_semantic_tokens=c.semantic_tokens, drop_text_embeds=True
            )
        elif name == "coarse":
            stage = CoarseTransformer(**shared, **acoustic, num_semantic_tokens=c.semantic_tokens)
        else:
            stage = FineTransformer(
                **shared, **acoustic, num_fine_quantizers=c.fine_quantizers,
                drop_text_embeds=True, centred_pos_bias=True,
            )  # fmt: skip
        # The default, standard normal, starts at a loss of many nats and hardly moves at Adam's
        # step sizes.
        for key, weight in stage.named_parameters():
            if key.endswith(("embedding.weight", "logit_weights")):
                torch.nn.init.normal_(weight, std=0.05)
        return stage

    def train(
        self,
        name: str,
        dataset: Dataset[Any] | Sequence[Tensor],
        sample_hz: int,
        steps: int,
        batch_size: int = 16,
        *,
        learning_rate: float = 1e-3,
        warmup_steps: int = 50,
        save_every_seconds: float = 60.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> dict[str, float]:
        """Train a stage on clips and write it, or go on where an earlier call was stopped.

        The learning rate rises linearly, then falls by a cosine to 2%. A run that was stopped and
        goes on with the same arguments ends with the weights of one that never was.

        Args:
            name: semantic, coarse or fine.
            dataset: clips ``(samples,)``, or tuples that start with one.
            sample_hz: their rate.
            steps: optimizer steps in all.
            batch_size: clips per step.
            learning_rate, warmup_steps: of Adam.
            save_every_seconds: between two saves.
            seed: of weights, masks and the order of the clips.
            **kwargs: passed on to the stage's trainer.

        Returns:
            ``{"loss": mean of up to 50 last steps, "valid_loss": ..., "steps": ...,
            "seconds": of this call's steps}``.

        Raises:
            KeyboardInterrupt: Ctrl-C (or SIGTERM) came; the step was finished and the stage saved.
            FloatingPointError: the loss is not finite; the last saved state stays as it is.
        """
        check_positive_int("steps", steps)
        check_positive("learning_rate", learning_rate)
        options: dict[str, Any] = dict(
            num_train_steps=steps, batch_size=batch_size, dataset=dataset,
            audio_conditioner=self.quantizer, data_sample_hz=sample_hz, save_model_every=10**9,
            save_results_every=10**9, results_folder=self.folder, lr=learning_rate,
            random_split_seed=seed,
        )  # fmt: skip
        options.update(kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = random.getstate()  # which stream a hyper-connection starts on
            random.seed(seed)
            stage = self.stage(name)
            random.setstate(drawn)
            trainer: Any
            if name == "semantic":
                trainer = SemanticTransformerTrainer(self.tokenizer, stage, **options)
            elif name == "coarse":
                trainer = CoarseTransformerTrainer(stage, self.codec, self.tokenizer, **options)
            else:
                trainer = FineTransformerTrainer(stage, self.codec, **options)
            path = self.folder / f"{name}.pt"
            if path.is_file():
                trainer.load(path)
            seconds = 0.0
            losses: list[float] = []
            done = saved = int(trainer.steps)
            bar = progress_bar(total=steps, initial=done, unit="step", desc=f"training {name}")
            saved_at = time.monotonic()
            with bar, stop_requests() as stopped:
                while done < steps and not stopped():
                    rate = _learning_rate(learning_rate, done, warmup_steps, steps)
                    for group in trainer.optim.param_groups:
                        group["lr"] = rate
                    began = time.monotonic()
                    loss = trainer.train_step()["loss"]
                    seconds += time.monotonic() - began
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"the loss is {loss} at step {done + 1}")
                    done += 1
                    losses = [*losses[-49:], loss]
                    bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
                    bar.update()
                    if time.monotonic() - saved_at > save_every_seconds:
                        trainer.save(path)
                        saved, saved_at = done, time.monotonic()
                if saved < done or not path.is_file():
                    trainer.save(path)
                if stopped() and done < steps:
                    raise KeyboardInterrupt
            recent = sum(losses) / len(losses) if losses else math.nan
            valid: float = trainer.validate()
        return {"loss": recent, "valid_loss": valid, "steps": done, "seconds": seconds}

    def musiclm(self) -> MusicLM:
        """The MusicLM of the trained stages, in eval mode.

        Raises:
            FileNotFoundError: a stage is not trained yet.
            ValueError: a stage was trained with another MuLaN or quantizer.
        """
        stages = {}
        for name in STAGES:
            stage = self.stage(name)
            path = self.folder / f"{name}.pt"
            if not path.is_file():
                raise FileNotFoundError(f"no {path}: train the {name} stage first")
            stage.load(path, audio_conditioner=self.quantizer)
            stages[f"{name}_transformer"] = stage
        audio_lm = AudioLM(wav2vec=self.tokenizer, codec=self.codec, **stages)
        return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=self.quantizer).eval()


def _learning_rate(highest: float, step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return highest * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
