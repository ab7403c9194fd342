"""From a MuLaN to music: fits tokenizer, codec and quantizer, trains the stages, generates.

All of it lives in one folder: ``parts.pt`` holds the sizes, tokenizer, codec and quantizer,
``semantic.pt``, ``coarse.pt`` and ``fine.pt`` the stages, and ``semantic/``, ``coarse/`` and
``fine/`` their runs: checkpoints, log and configuration. Everything is read weights-only.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast._checkpoint import CheckpointError, read_checkpoint, save_atomically
from musiclm_fast._checks import check_choice
from musiclm_fast.audiolm.audio_lm import STAGES, AudioLM
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.mel_codec import MelCodec
from musiclm_fast.audiolm.mel_kmeans import MelKmeans
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.models.configuration import mulan_config
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.quantizer import MuLaNEmbedQuantizer
from musiclm_fast.musiclm.config import MusicConfig, TrainStageConfig
from musiclm_fast.musiclm.musiclm import MusicLM
from musiclm_fast.training.options import RunOptions
from musiclm_fast.training.run_folder import RunFolder, stage_form

if TYPE_CHECKING:
    from musiclm_fast.training.stages import StageTrainer

PARTS = "parts.pt"


def saved_sizes(folder: str | Path) -> MusicConfig:
    """The sizes of the project in a folder.

    Raises:
        CheckpointError: the folder's file is not a project's.
    """
    return _config_of(Path(folder) / PARTS, read_checkpoint(Path(folder) / PARTS))


def _config_of(path: Path, state: dict[str, Any]) -> MusicConfig:
    try:
        return MusicConfig(**state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no project's: {error}") from error


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
            config = _config_of(self.folder / PARTS, state)
            mulan = MuLaN.from_config(state.get("mulan", {}))
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

    def trainer(
        self,
        name: str,
        dataset: Dataset[Any] | Sequence[Tensor],
        sample_hz: int,
        options: RunOptions,
        restart: bool = False,
        **kwargs: Any,
    ) -> StageTrainer:
        """The trainer of a stage, which goes on where an earlier run of it stopped.

        Its checkpoints and its log are in a folder of the stage's name.

        Args:
            name: semantic, coarse or fine.
            dataset: clips ``(samples,)``, or tuples that start with one.
            sample_hz: their rate.
            options: of the run; ``training.output`` is the project's folder, whatever it says.
            restart: delete an earlier run of the stage.
            **kwargs: passed on to the stage's trainer.
        """
        # accelerate is needed for training only
        from musiclm_fast.training.accelerated import PartialState
        from musiclm_fast.training.preparation import processes_on_cpu
        from musiclm_fast.training.stages import TRAINERS

        seed = options.training.seed
        drawn = random.getstate()  # which stream a hyper-connection starts on
        random.seed(seed)
        stage = self.stage(name)
        random.setstate(drawn)
        training = replace(options.training, output=str(self.folder / name))
        if restart and PartialState(cpu=processes_on_cpu()).is_main_process:
            RunFolder(training.output, stage_form(name)).clear()
        parts: dict[str, tuple[Any, ...]] = {
            "semantic": (self.tokenizer, stage),
            "coarse": (stage, self.codec, self.tokenizer),
            "fine": (stage, self.codec),
        }
        trainer = TRAINERS[name](
            *parts[name], dataset=cast(Any, dataset), audio_conditioner=self.quantizer,
            data_sample_hz=sample_hz, options=replace(options, training=training), resume=True,
            **kwargs,
        )  # fmt: skip
        path = self.stage_file(name)
        fresh = trainer.step == 0 and path.is_file() and not restart
        if fresh and "training" not in read_checkpoint(path):  # a project of an earlier version
            trainer.load(path)
        return trainer

    def train(
        self,
        name: str,
        dataset: Dataset[Any] | Sequence[Tensor],
        sample_hz: int,
        steps: int | None = None,
        batch_size: int | None = None,
        *,
        options: RunOptions | None = None,
        restart: bool = False,
        accelerate_kwargs: dict[str, Any] | None = None,
        num_workers: int = 0,
        **arguments: Any,
    ) -> dict[str, float]:
        """Train a stage on clips and write it, or go on where an earlier call was stopped.

        A run that was stopped and goes on with the same arguments ends with the weights of one
        that never was.

        Args:
            name: semantic, coarse or fine.
            dataset: clips ``(samples,)``, or tuples that start with one.
            sample_hz: their rate.
            steps: optimizer steps in all; default those of the options.
            batch_size: clips per step; default that of the options.
            options: of the run; default those of ``musiclm-fast train``.
            restart: delete an earlier run of the stage.
            accelerate_kwargs, num_workers: see the stage's trainer.
            **arguments: fields of the options, such as ``lr``, ``warmup_steps`` or
                ``random_split_seed``.

        Returns:
            ``{"loss": mean of up to 50 last steps, "valid_loss": ..., "steps": ...,
            "seconds": of this call}``.

        Raises:
            KeyboardInterrupt: Ctrl-C (or SIGTERM) came; the step was finished and the run saved.
            FloatingPointError: too many steps in a row were not finite.
            CheckpointError: an earlier run of the stage had other options.
        """
        check_choice("stage", name, STAGES)
        options = options or RunOptions.of(TrainStageConfig())
        for argument, value in (("num_train_steps", steps), ("batch_size", batch_size)):
            if value is not None:
                arguments[argument] = value
        options = options.with_arguments(arguments)
        losses: deque[float] = deque(maxlen=50)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.training.seed)
            trainer = self.trainer(
                name, dataset, sample_hz, options, restart, accelerate_kwargs=accelerate_kwargs,
                num_workers=num_workers,
            )  # fmt: skip
            began = time.monotonic()
            try:
                trainer.train(lambda log: losses.append(log["loss"]))
            except KeyboardInterrupt:  # what is learned so far can be heard
                trainer.save(self.stage_file(name))
                raise
            seconds = time.monotonic() - began
            trainer.save(self.stage_file(name))
            found = trainer.last_validation or trainer.measure()
        recent = sum(losses) / len(losses) if losses else math.nan
        valid = found["valid_loss"]
        return {"loss": recent, "valid_loss": valid, "steps": trainer.step, "seconds": seconds}

    def stage_file(self, name: str) -> Path:
        """Where a trained stage is."""
        return self.folder / f"{name}.pt"

    def musiclm(self) -> MusicLM:
        """The MusicLM of the trained stages, in eval mode.

        Raises:
            FileNotFoundError: a stage is not trained yet.
            ValueError: a stage was trained with another MuLaN or quantizer.
        """
        stages = {}
        for name in STAGES:
            stage = self.stage(name)
            path = self.stage_file(name)
            if not path.is_file():  # killed in its first run
                path = self.folder / name / stage_form(name).latest
            if not path.is_file():
                raise FileNotFoundError(f"no {self.stage_file(name)}: train the {name} stage first")
            stage.load(path, audio_conditioner=self.quantizer)
            stages[f"{name}_transformer"] = stage
        audio_lm = AudioLM(wav2vec=self.tokenizer, codec=self.codec, **stages)
        return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=self.quantizer).eval()
