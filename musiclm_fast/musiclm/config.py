"""What ``musiclm-fast train semantic``, ``coarse`` and ``fine`` are told.

Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from musiclm_fast._config import ConfigError, setting
from musiclm_fast.training.options import (
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
    ValidationConfig,
    check_range,
)


@dataclass(frozen=True)
class MusicConfig:
    """Sizes of a small MusicLM.

    Args:
        dim: width of each stage
        depth: blocks of each stage
        heads: attention heads of each stage
        residual_streams: of the stages' hyper-connections; 1 is a plain residual, and faster
        semantic_tokens: clusters of the semantic tokenizer
        semantic_hop: samples at 16 kHz per semantic token
        codebook_size: entries of each of the codec's codebooks
        codec_hop: samples at 16 kHz per time step of the codec
        codec_bands: mel bands of the codec; more rebuild better, fewer are easier to learn
        coarse_quantizers: codebooks whose tokens the coarse stage writes
        fine_quantizers: codebooks whose tokens the fine stage writes
        condition_quantizers: codebooks of the quantizer of MuLaN's embeddings
        condition_codes: entries of each of these
        window_seconds: MuLaN hears longer clips in windows of this length, every half of it; 0
            for as a whole
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
            if name == "window_seconds":
                fits, wanted = 0 <= value < math.inf, "0 or a number of seconds"
            else:
                whole = isinstance(value, int) and not isinstance(value, bool)
                fits, wanted = whole and value > 0, "an integer above 0"
            if not fits:
                raise ConfigError(f"{name}: got {value!r}, expected {wanted}")


@dataclass(frozen=True)
class StageDataConfig:
    """The sounds.

    Args:
        source: a folder of sound files, also in folders below it; it must be given
        clip_seconds: length of a clip in seconds; longer sounds are cropped at random
        fit_clips: clips that tokenizer, codec and quantizer are fitted on
        num_workers: processes that read sounds ahead; 0 reads in the training process
    """

    source: str | None = None
    clip_seconds: float = 5.0
    fit_clips: int = 1024
    num_workers: int = setting(0, may_change=True)

    def __post_init__(self) -> None:
        check_range(self, "> 0", "clip_seconds", "fit_clips")
        check_range(self, ">= 0", "num_workers")


@dataclass(frozen=True)
class TrainStageConfig:
    """All of it.

    Args:
        mulan: the trained MuLaN, a checkpoint's file or folder; needed for a new output folder
        music: sizes of the stages, tokenizer, codec and quantizer; an output folder that holds a
            tokenizer, codec and quantizer keeps theirs
        data: the sounds
        optimizer: the optimizer
        schedule: the learning rate over the run
        training: the run
        validation: validation during training
    """

    mulan: str = setting("demo-output/mulan.pt", may_change=True)
    music: MusicConfig = field(default_factory=MusicConfig)
    data: StageDataConfig = field(default_factory=StageDataConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            "adam", 1e-3, (0.9, 0.99), weight_decay=0.0, max_grad_norm=0.5
        )
    )
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup_steps=50))
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            "music-output", steps=1000, batch_size=16, save_every=200, keep_last=1, keep_best=0
        )
    )
    validation: ValidationConfig = field(default_factory=lambda: ValidationConfig(rows=64))
