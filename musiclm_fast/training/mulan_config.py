"""What ``musiclm-fast train mulan`` is told: the model, the data, and how to train.

Importing this imports neither torch nor numpy; :mod:`musiclm_fast._config` reads,
checks and explains it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from musiclm_fast._config import ConfigError, may_change


def _check(config: Any, allowed: str, *names: str) -> None:
    # allowed: "> 0", ">= 0", ">= 2", "[0, 1)" or "[0, 1]"
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if allowed.startswith("["):
            fits = 0 <= value < 1 or (value == 1 and allowed.endswith("]"))
            wanted = f"a share in {allowed}"
        elif allowed == "> 0":
            fits, wanted = 0 < value < math.inf, "above 0"
        else:
            least = int(allowed.removeprefix(">= "))
            fits, wanted = least <= value < math.inf, f"at least {least}"
        if not fits:
            raise ConfigError(f"{name}: got {value!r}, expected {wanted}")


@dataclass(frozen=True)
class AudioTowerConfig:
    """The audio tower: an Audio Spectrogram Transformer, or an encoder from Hugging Face.

    Args:
        hugging_face: folder or name of a pretrained audio encoder (wav2vec 2.0, AST, Whisper's
            encoder, CLAP's audio half, ...) in place of the fields below; null for our own tower
        frozen: keep the Hugging Face encoder as it is, and train what comes after it
        pooling: of a Hugging Face encoder, over time or its first token
        dim: width of the transformer, a multiple of 4
        depth: number of blocks
        heads: attention heads
        dim_head: width of a head
        patch_size: bands and frames of a patch of the spectrogram
        patch_dropout: share of each clip's patches that are left out in training
        attn_dropout: dropout of attention weights
        ff_dropout: dropout in the feed-forwards
    """

    hugging_face: str | None = None
    frozen: bool = True
    pooling: Literal["mean", "cls"] = "mean"
    dim: int = 512
    depth: int = 6
    heads: int = 8
    dim_head: int = 64
    patch_size: tuple[int, int] = (16, 16)
    patch_dropout: float = 0.25
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "> 0", "dim", "depth", "heads", "dim_head")
        _check(self, "[0, 1)", "patch_dropout", "attn_dropout", "ff_dropout")
        if self.dim % 4 or self.dim == 4:
            raise ConfigError(f"dim: got {self.dim}, expected a multiple of 4 above 4")
        if min(self.patch_size) < 1:
            raise ConfigError(f"patch_size: got {list(self.patch_size)}, expected sizes above 0")


@dataclass(frozen=True)
class TextTowerConfig:
    """The text tower: a transformer over CLIP's tokens, or an encoder from Hugging Face.

    Args:
        hugging_face: folder or name of a pretrained text encoder (BERT, RoBERTa, T5, ...) in place
            of the fields below; null for our own tower
        frozen: keep the Hugging Face encoder as it is, and train what comes after it
        pooling: of a Hugging Face encoder; over a text's tokens, its first or its last one
        dim: width of the transformer
        depth: number of blocks
        heads: attention heads
        dim_head: width of a head
        max_tokens: longest caption in tokens; longer ones are cut
        attn_dropout: dropout of attention weights
        ff_dropout: dropout in the feed-forwards
        embedding_std: spread of the first token embeddings; null for the reference's 1, which
            learns more slowly
    """

    hugging_face: str | None = None
    frozen: bool = True
    pooling: Literal["mean", "cls", "last"] = "mean"
    dim: int = 512
    depth: int = 6
    heads: int = 8
    dim_head: int = 64
    max_tokens: int = 256
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    embedding_std: float | None = 0.05

    def __post_init__(self) -> None:
        _check(self, "> 0", "dim", "depth", "heads", "dim_head", "max_tokens", "embedding_std")
        _check(self, "[0, 1)", "attn_dropout", "ff_dropout")


@dataclass(frozen=True)
class ModelConfig:
    """The model.

    Args:
        front_end: from sound to spectrogram: mulan (64-band log-mel, 16 kHz), ast (128 bands), or
            reference (musiclm-pytorch's, which hardly learns from real audio)
        dim_latent: width of the joint space
        loss: softmax without the positive pair in its denominators, softmax, or sigmoid
        hierarchical_loss: add the loss of intermediate layers
        max_temperature: cap on the learned factor of the similarities (CLIP's is 100); null leaves
            it free, and it may then rise beyond use
        start_from: folder or Hugging Face Hub name of a MuLaN whose weights are the first ones; its
            architecture must be the one that is described here
        audio: the audio tower
        text: the text tower
    """

    front_end: Literal["mulan", "ast", "reference"] = "mulan"
    dim_latent: int = 128
    loss: Literal["decoupled", "softmax", "sigmoid"] = "decoupled"
    hierarchical_loss: bool = False
    max_temperature: float | None = 100.0
    start_from: str | None = None
    audio: AudioTowerConfig = field(default_factory=AudioTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)

    def __post_init__(self) -> None:
        _check(self, "> 0", "dim_latent", "max_temperature")


@dataclass(frozen=True)
class DataConfig:
    """The captioned sounds.

    Args:
        source: what to train on, which must be given: a csv, tsv or jsonl with path and caption,
            MusicCaps' csv, a folder with such a table, webdataset shards (.tar)
        kind: of the source; auto looks
        audio_folder: where the sounds are, if not beside the table
        captions: of a folder without a table: the files' names, or the tags in them
        clip_seconds: length of a clip in seconds; longer sounds are cropped at random
        min_seconds: shorter sounds are skipped
        extra_words: most random words before a caption and after it in training, from which the
            text tower learns to pass over words that it does not know; of use where captions are
            few or alike
        sample_hz: rate of the clips in Hz; null is the front end's (16,000 for reference, which has
            none)
        num_workers: processes that read sounds ahead; 0 reads in the training process
    """

    source: str | None = None
    kind: Literal["auto", "manifest", "musiccaps", "folder", "webdataset"] = "auto"
    audio_folder: str | None = None
    captions: Literal["names", "tags"] | None = None
    clip_seconds: float = 10.0
    min_seconds: float = 0.2
    extra_words: int = 0
    sample_hz: int | None = None
    num_workers: int = may_change(2)

    def __post_init__(self) -> None:
        _check(self, "> 0", "clip_seconds", "min_seconds", "sample_hz")
        _check(self, ">= 0", "num_workers", "extra_words")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer.

    Args:
        name: adamw, lion (wants a third of the learning rate or less), or adam
        learning_rate: the highest, after the warm-up
        betas: of the moments
        weight_decay: of weight matrices; norms, biases, scales and embeddings do not decay
        max_grad_norm: gradients are clipped to this norm; null for no clipping
    """

    name: Literal["adamw", "lion", "adam"] = "adamw"
    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _check(self, "> 0", "learning_rate", "max_grad_norm")
        _check(self, ">= 0", "weight_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas: got {list(self.betas)}, expected two numbers in [0, 1)")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run.

    Args:
        name: how it falls after the warm-up
        warmup_steps: steps in which it rises linearly
        final: share of the learning rate at the end
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 200
    final: float = 0.02

    def __post_init__(self) -> None:
        _check(self, ">= 0", "warmup_steps")
        _check(self, "[0, 1]", "final")


@dataclass(frozen=True)
class TrainingConfig:
    """The run.

    Args:
        output: folder of the checkpoints, the log and this configuration
        steps: optimizer steps
        batch_size: pairs per step and process; more negatives learn better
        accumulate: batches per step; their negatives do not meet, grad_cache_chunk's do
        grad_cache_chunk: pairs that run through the towers at once, for a batch larger than memory
            holds; null runs all
        precision: bf16 on a GPU that has it; no is float32
        activation_checkpointing: save memory by computing each block twice
        compile: compile the towers with torch.compile (minutes at the start)
        ema_decay: of an average of the weights, such as 0.999, that is then validated and saved;
            null for none
        max_skipped_steps: steps with a loss or gradient that is not finite are skipped; so many in
            a row end the run
        seed: of every random draw
        save_every: steps between checkpoints
        keep_last: delete older checkpoints of this run but for so many newest; null deletes none
        keep_best: where older ones are deleted, keep the best so many by validation too
        log_every: steps between lines of log.jsonl and calls of trackers
        log_with: accelerate's trackers, such as [tensorboard] or [wandb]
    """

    output: str = may_change("mulan-output")
    steps: int = 10_000
    batch_size: int = 64
    accumulate: int = 1
    grad_cache_chunk: int | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    activation_checkpointing: bool = may_change(False)
    compile: bool = may_change(False)
    ema_decay: float | None = None
    max_skipped_steps: int = may_change(10)
    seed: int = 0
    save_every: int = may_change(500)
    keep_last: int | None = may_change(None)
    keep_best: int = may_change(3)
    log_every: int = may_change(10)
    log_with: tuple[str, ...] = may_change(())

    def __post_init__(self) -> None:
        _check(self, "> 0", "steps", "accumulate", "grad_cache_chunk", "ema_decay", "save_every",
               "max_skipped_steps", "keep_last", "log_every")  # fmt: skip
        _check(self, ">= 2", "batch_size")
        _check(self, ">= 0", "keep_best", "seed")
        _check(self, "[0, 1)", "ema_decay")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation during training.

    Args:
        share: of the sound files that are kept out of training
        every: steps between validations; null is with every checkpoint
        rows: most clips that a validation looks at
        best_by: what makes a checkpoint the best: the loss, or recall (mean of both ways)
    """

    share: float = 0.05
    every: int | None = may_change(None)
    rows: int = may_change(1024)
    best_by: Literal["valid_loss", "valid_recall@1", "valid_recall@5", "valid_recall@10"] = (
        "valid_loss"
    )

    def __post_init__(self) -> None:
        _check(self, "[0, 1)", "share")
        _check(self, "> 0", "every")
        _check(self, ">= 2", "rows")


@dataclass(frozen=True)
class TrainMuLaNConfig:
    """All of it.

    Args:
        model: the model
        data: the captioned sounds
        optimizer: the optimizer
        schedule: the learning rate over the run
        training: the run
        validation: validation during training
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
