"""From a MuLaN to music: fits tokenizer, codec and quantizer, trains the stages, generates.

All of it lives in one folder: ``parts.pt`` holds the sizes, tokenizer, codec and quantizer,
``semantic.pt``, ``coarse.pt`` and ``fine.pt`` the stages. Everything is read weights-only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from musiclm_fast._checks import check_choice, check_positive_int, fail
from musiclm_fast.audiolm.audio_lm import STAGES, AudioLM
from musiclm_fast.audiolm.coarse import CoarseTransformer
from musiclm_fast.audiolm.embedded import MelCodec, MelKmeans
from musiclm_fast.audiolm.fine import FineTransformer
from musiclm_fast.audiolm.semantic import SemanticTransformer
from musiclm_fast.models.configuration import CheckpointError, build_mulan, mulan_config
from musiclm_fast.models.mulan import MuLaN
from musiclm_fast.models.musiclm import MusicLM
from musiclm_fast.models.quantizer import MuLaNEmbedQuantizer
from musiclm_fast.training.checkpoint import read_checkpoint, save_atomically
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
        semantic_tokens: clusters of the semantic tokenizer.
        codebook_size: entries of each of the codec's codebooks.
        coarse_quantizers, fine_quantizers: how many the two stages write.
        condition_quantizers, condition_codes: codebooks of the quantizer of MuLaN's embeddings.
    """

    dim: int = 256
    depth: int = 4
    heads: int = 4
    semantic_tokens: int = 128
    codebook_size: int = 256
    coarse_quantizers: int = 2
    fine_quantizers: int = 2
    condition_quantizers: int = 8
    condition_codes: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_positive_int(name, value)


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
                mulan, config = build_mulan(state["mulan"]), MusicConfig(**state["config"])
            except (KeyError, TypeError) as error:
                raise CheckpointError(f"{self.folder / PARTS} is no project's: {error}") from error
        self.config = config or MusicConfig()
        self.tokenizer = MelKmeans(self.config.semantic_tokens)
        self.codec = MelCodec(
            self.config.coarse_quantizers + self.config.fine_quantizers, self.config.codebook_size
        )
        self.quantizer = MuLaNEmbedQuantizer(
            mulan.eval(), (self.config.dim,) * 3,
            rq_num_quantizers=self.config.condition_quantizers,
            codebook_size=self.config.condition_codes,
        )  # fmt: skip
        if state:
            for name in ("tokenizer", "codec", "quantizer"):
                getattr(self, name).load_state_dict(state[name])
            self.quantizer.freeze()

    def fit(self, clips: Sequence[Any], sample_hz: int, progress: bool = True) -> None:
        """Fit tokenizer, codec and quantizer to clips ``(samples,)`` and write them."""
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
            dim=c.dim, depth=c.depth, heads=c.heads, audio_text_condition=True, cond_drop_prob=0.1
        )
        if name == "semantic":
            return SemanticTransformer(
                **shared, num_semantic_tokens=c.semantic_tokens, drop_text_embeds=True
            )
        acoustic: dict[str, Any] = dict(
            codebook_size=c.codebook_size, num_coarse_quantizers=c.coarse_quantizers
        )
        if name == "coarse":
            return CoarseTransformer(**shared, **acoustic, num_semantic_tokens=c.semantic_tokens)
        return FineTransformer(
            **shared, **acoustic, num_fine_quantizers=c.fine_quantizers, drop_text_embeds=True,
            centred_pos_bias=True,
        )  # fmt: skip

    def train(
        self,
        name: str,
        dataset: Dataset[Any] | Sequence[Tensor],
        sample_hz: int,
        steps: int,
        batch_size: int = 16,
        **kwargs: Any,
    ) -> float:
        """Train a stage on clips and write it; returns the last loss."""
        stage = self.stage(name)
        options: dict[str, Any] = dict(
            num_train_steps=steps, batch_size=batch_size, dataset=dataset,
            audio_conditioner=self.quantizer, data_sample_hz=sample_hz, save_model_every=10**9,
            results_folder=self.folder, lr=1e-3,
        )  # fmt: skip
        options.update(kwargs)
        trainer: Any
        if name == "semantic":
            trainer = SemanticTransformerTrainer(self.tokenizer, stage, **options)
        elif name == "coarse":
            trainer = CoarseTransformerTrainer(stage, self.codec, self.tokenizer, **options)
        else:
            trainer = FineTransformerTrainer(stage, self.codec, **options)
        losses: list[float] = []
        trainer.train(lambda log: losses.append(log["loss"]))
        trainer.save(self.folder / f"{name}.pt")
        return losses[-1]

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


def write_wave(path: str | Path, wave: Tensor | None, sample_hz: int) -> None:
    """Write ``(1, samples)`` as a sound file, scaled down where it would clip.

    Raises:
        ValueError: there is nothing to write.
    """
    import soundfile

    if wave is None or wave.numel() == 0:
        fail("wave", "an empty one: the model ended at once", "sound; try another seed")
    flat = wave.detach().reshape(-1).float().cpu()
    flat = torch.nan_to_num(flat) / max(1.0, float(flat.abs().max()))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), flat.numpy(), sample_hz)
