"""From a configuration to a trained MuLaN in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from musiclm_fast._config import ConfigError, plain_differences
from musiclm_fast._wording import plural
from musiclm_fast.datasets.opening import open_dataset
from musiclm_fast.datasets.splitting import split
from musiclm_fast.models.audio_tower import AudioSpectrogramTransformer
from musiclm_fast.models.configuration import mulan_config
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.text_tower import TextTransformer
from musiclm_fast.training.accelerated import PartialState
from musiclm_fast.training.configured_run import check_same_run, delete_run, write_config
from musiclm_fast.training.mulan import MuLaNTrainer
from musiclm_fast.training.mulan_config import (
    AudioTowerConfig,
    ModelConfig,
    TextTowerConfig,
    TrainMuLaNConfig,
)
from musiclm_fast.training.options import RunOptions
from musiclm_fast.training.preparation import processes_on_cpu
from musiclm_fast.training.run_folder import MULAN

DEFAULT_HZ = 16_000  # where neither the front end nor the configuration names a rate


def build_model(config: ModelConfig) -> MuLaN:
    """The model that a configuration describes, with its first weights.

    Raises:
        ConfigError: ``start_from`` is of another architecture.
        OSError, ValueError: a Hugging Face encoder or ``start_from`` cannot be had.
    """
    mulan = MuLaN(
        _audio_tower(config.audio, config.front_end),
        _text_tower(config.text),
        dim_latent=config.dim_latent,
        decoupled_contrastive_learning=config.loss == "decoupled",
        hierarchical_contrastive_loss=config.hierarchical_loss,
        max_temperature=config.max_temperature,
        sigmoid_contrastive_loss=config.loss == "sigmoid",
    )
    if config.start_from is not None:
        start = MuLaN.from_pretrained(config.start_from)
        try:
            mulan.load_state_dict(start.state_dict())
        except RuntimeError as error:
            found = plain_differences(mulan_config(start), mulan_config(mulan))
            raise ConfigError(
                f"model.start_from: {config.start_from!r} is of another architecture "
                f"({'; '.join(found)})"
            ) from error
    return mulan


def _audio_tower(config: AudioTowerConfig, front_end: str) -> Any:
    if config.hugging_face is not None:
        from musiclm_fast.models.hugging_face_audio import HuggingFaceAudio

        return HuggingFaceAudio(config.hugging_face, frozen=config.frozen, pooling=config.pooling)
    return AudioSpectrogramTransformer(
        dim=config.dim, depth=config.depth, heads=config.heads, dim_head=config.dim_head,
        patch_size=config.patch_size, patch_dropout_prob=config.patch_dropout,
        attn_dropout=config.attn_dropout, ff_dropout=config.ff_dropout,
        front_end=front_end,
    )  # fmt: skip


def _text_tower(config: TextTowerConfig) -> Any:
    if config.hugging_face is not None:
        from musiclm_fast.models.hugging_face_text import HuggingFaceText

        return HuggingFaceText(
            config.hugging_face, frozen=config.frozen, pooling=config.pooling,
            max_seq_len=config.max_tokens,
        )  # fmt: skip
    text = TextTransformer(
        dim=config.dim, depth=config.depth, heads=config.heads, dim_head=config.dim_head,
        max_seq_len=config.max_tokens, attn_dropout=config.attn_dropout,
        ff_dropout=config.ff_dropout,
    )  # fmt: skip
    if config.embedding_std is not None:
        # Standard normal embeddings hardly move at Adam's step sizes.
        for embedding in (text.token_emb, text.pos_emb):
            nn.init.normal_(embedding.weight, std=config.embedding_std)
    return text


def make_trainer(config: TrainMuLaNConfig) -> MuLaNTrainer:
    """The trainer of a run, which goes on where an earlier one in the output folder stopped.

    Raises:
        ConfigError: ``data.source`` is not given, or its sounds are fewer than a batch.
        CheckpointError: the output folder holds another run.
        FileNotFoundError, ValueError: the data or a pretrained part cannot be had.
    """
    data, training, validation = config.data, config.training, config.validation
    if data.source is None:
        raise ConfigError("data.source: got null, expected a table, a folder or shards of sounds")
    check_same_run(config, training.output)
    torch.manual_seed(training.seed)
    mulan = build_model(config.model)
    front_end: Any = mulan.audio.front_end
    known = front_end.sample_hz
    if known is not None and data.sample_hz not in (None, known):
        raise ConfigError(f"data.sample_hz: got {data.sample_hz}, expected the front end's {known}")
    sample_hz = known or data.sample_hz or DEFAULT_HZ
    dataset = open_dataset(
        data.source, sample_hz=sample_hz, clip_seconds=data.clip_seconds, kind=data.kind,
        audio=data.audio_folder, captions=data.captions, min_seconds=data.min_seconds,
        extra_words=data.extra_words,
    )  # fmt: skip
    train, valid = split(dataset, validation.share, training.seed)
    needed = training.batch_size * PartialState(cpu=processes_on_cpu()).num_processes
    if len(train) < needed:
        raise ConfigError(
            f"training.batch_size: got {training.batch_size}, {plural(needed, 'pair')} a step, "
            f"expected at most the {plural(len(train), 'sound')} to train on ({len(valid)} are "
            "for validation)"
        )
    trainer = MuLaNTrainer(
        mulan,
        train,
        valid_dataset=valid if len(valid) else train,
        options=RunOptions.of(config),
        resume=True,
        num_workers=data.num_workers,
        extra={"clip_seconds": data.clip_seconds, "sample_rate": sample_hz},
    )
    if not len(valid):
        trainer.print(
            f"validation.share: no file of {len(train)} fell into validation; validating on what "
            "is trained on"
        )
    if trainer.is_main:
        write_config(config, training.output)
    return trainer


def train_mulan(
    config: TrainMuLaNConfig, *, restart: bool = False, log_fn: Callable[[Any], Any] | None = None
) -> MuLaNTrainer:
    """Train what a configuration describes, or go on where an earlier run of it stopped.

    Args:
        config: the run.
        restart: delete an earlier run's checkpoints and log in the output folder.
        log_fn: see :meth:`MuLaNTrainer.train`.

    Returns:
        The trainer, which has trained.

    Raises:
        KeyboardInterrupt: Ctrl-C (or SIGTERM) came; the step was finished and the run saved.
        ConfigError, CheckpointError, OSError, FloatingPointError: see :func:`make_trainer` and
            :meth:`MuLaNTrainer.train`.
    """
    state = PartialState(cpu=processes_on_cpu())
    if restart and state.is_main_process:
        delete_run(config.training.output)
    state.wait_for_everyone()
    trainer = make_trainer(config)
    size = sum(p.numel() for p in trainer.unwrapped.parameters()) / 1e6
    trainer.print(
        f"training {size:.1f} M parameters on {trainer.device}; a model that learns nothing stays "
        f"at a loss of {trainer.collapsed_loss:.2f}"
    )
    trainer.train(log_fn)
    output = Path(config.training.output)
    name = MULAN.best if (output / MULAN.best).exists() else MULAN.latest
    trainer.print(f"the model is in {output / name}")
    return trainer
