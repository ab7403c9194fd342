"""Modules that have moved: importing one under its old name says where it is now.

For one release; 0.2.0 forgets the old names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# old name: new name or names, below musiclm_fast
MOVED = {
    "audiolm.embedded": "audiolm.mel_codec and audiolm.mel_kmeans",
    "audiolm.layers": "audiolm.transformer",
    "audiolm.step": "audiolm.decoder",
    "audiolm.text": "audiolm.text_encoder",
    "compat": "interop.alias",
    "models.audio": "models.audio_tower",
    "models.clustering": "nn.kmeans",
    "models.contrastive": "models.losses",
    "models.convert": "interop.convert",
    "models.layers": "nn.transformer",
    "models.musiclm": "musiclm.musiclm",
    "models.resample": "audio.resampling",
    "models.sound": "audio.reading, audio.resampling and audio.batching",
    "models.text": "models.text_tower",
    "training.batches": "datasets.sampling and training.random_state",
    "training.captions": "datasets.random_words",
    "training.checkpoint": "models.checkpoint",
    "training.config": "training.mulan_config",
    "training.cost": "cost",
    "training.data": "datasets.opening, datasets.captioned_sounds and datasets.collation",
    "training.data_check": "datasets.check",
    "training.data_convert": "datasets.convert",
    "training.demo": "demo.mulan_demo",
    "training.embedding": "inference.embedder",
    "training.evaluate": "evaluation.evaluate",
    "training.general_midi": "demo.instruments and demo.rendering",
    "training.judge": "evaluation.instrument_classifier",
    "training.metrics": "evaluation.metrics",
    "training.music": "musiclm.project and musiclm.config",
    "training.music_demo": "demo.music_demo",
    "training.music_index": "inference.search_index",
    "training.phrases": "demo.melodies",
    "training.shards": "datasets.shards",
    "training.sound": "audio.windows",
    "training.sources": "datasets.sources",
    "training.trainer": "training.mulan",
    "training.watch": "training.monitor",
}


class MovedFinder:
    """Finds no module; says of an old name what the new one is."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Nothing.

        Raises:
            ModuleNotFoundError: the module has moved; the message says where to.
        """
        package, _, old = name.partition(".")
        if package == "musiclm_fast" and old in MOVED:
            new = MOVED[old].replace(", ", ", musiclm_fast.").replace(" and ", " and musiclm_fast.")
            raise ModuleNotFoundError(f"{name} is now musiclm_fast.{new}", name=name)
        return None


def install() -> None:
    """Ask the finder after all others, once."""
    if MovedFinder not in sys.meta_path:
        sys.meta_path.append(MovedFinder)
