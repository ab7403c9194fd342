"""What ``musiclm-fast train mulan`` is told: the model, the data, and how to train.

Importing this imports neither torch nor numpy; :mod:`musiclm_fast._config` reads,
checks and explains it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from musiclm_fast._config import ConfigError, setting
from musiclm_fast.training.options import (
    OptimizerConfig,
    RunOptions,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
    check_range,
)


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
        check_range(self, "> 0", "dim", "depth", "heads", "dim_head")
        check_range(self, "[0, 1)", "patch_dropout", "attn_dropout", "ff_dropout")
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
        embedding_std: spread of the first token embeddings; null for upstream's 1, which
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
        check_range(self, "> 0", "dim", "depth", "heads", "dim_head", "max_tokens", "embedding_std")
        check_range(self, "[0, 1)", "attn_dropout", "ff_dropout")


@dataclass(frozen=True)
class ModelConfig:
    """The model.

    Args:
        front_end: from sound to spectrogram: mulan (64-band log-mel, 16 kHz), ast (128 bands), or
            upstream (musiclm-pytorch's, which hardly learns from real audio)
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

    front_end: Literal["mulan", "ast", "upstream"] = setting(
        "mulan", renamed={"reference": "upstream"}
    )
    dim_latent: int = 128
    loss: Literal["decoupled", "softmax", "sigmoid"] = "decoupled"
    hierarchical_loss: bool = False
    max_temperature: float | None = 100.0
    start_from: str | None = None
    audio: AudioTowerConfig = field(default_factory=AudioTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)

    def __post_init__(self) -> None:
        check_range(self, "> 0", "dim_latent", "max_temperature")


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
        sample_hz: rate of the clips in Hz; null is the front end's (16,000 for upstream, which has
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
    num_workers: int = setting(2, may_change=True)

    def __post_init__(self) -> None:
        check_range(self, "> 0", "clip_seconds", "min_seconds", "sample_hz")
        check_range(self, ">= 0", "num_workers", "extra_words")


@dataclass(frozen=True)
class MuLaNTrainingConfig(TrainingConfig):
    """The run.

    Args:
        batch_size: pairs per step and process; more negatives learn better
        accumulate: batches per step; their negatives do not meet, grad_cache_chunk's do
        grad_cache_chunk: pairs that run through the towers at once, for a batch larger than memory
            holds; null runs all
        activation_checkpointing: save memory by computing each block twice
        compile: compile the towers with torch.compile (minutes at the start)
        ema_decay: of an average of the weights, such as 0.999, that is then validated and saved;
            null for none
    """

    output: str = setting("mulan-output", argument="results_folder", may_change=True)
    grad_cache_chunk: int | None = None
    activation_checkpointing: bool = setting(False, may_change=True)
    compile: bool = setting(False, argument="compile_towers", may_change=True)
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            wanted = "at least 2: a contrast needs a negative"
            raise ConfigError(f"batch_size: got {self.batch_size}, expected {wanted}")
        check_range(self, "> 0", "grad_cache_chunk", "ema_decay")
        check_range(self, "[0, 1)", "ema_decay")


@dataclass(frozen=True)
class MuLaNValidationConfig(ValidationConfig):
    """Validation during training.

    Args:
        share: of the sound files that are kept out of training
        best_by: what makes a checkpoint the best: the loss, or recall (mean of both ways)
    """

    best_by: Literal["valid_loss", "valid_recall@1", "valid_recall@5", "valid_recall@10"] = (
        "valid_loss"  # type: ignore[assignment]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, ">= 2", "rows")


#: Upstream's defaults, which are those of MuLaNTrainer.
UPSTREAM = RunOptions(
    OptimizerConfig("adam", 3e-4, (0.9, 0.99), weight_decay=0.0, max_grad_norm=0.5),
    ScheduleConfig("constant", warmup_steps=0, final=0.0),
    MuLaNTrainingConfig(
        "./results", precision=None, seed=42, save_every=1000, keep_best=1, log_every=1
    ),
    MuLaNValidationConfig(),
)


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
    training: MuLaNTrainingConfig = field(default_factory=MuLaNTrainingConfig)
    validation: MuLaNValidationConfig = field(default_factory=MuLaNValidationConfig)
