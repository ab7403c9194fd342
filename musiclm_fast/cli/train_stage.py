"""``musiclm-fast train semantic|coarse|fine``: a stage of MusicLM."""

from __future__ import annotations

import argparse

from musiclm_fast._config import to_yaml
from musiclm_fast.cli import _train
from musiclm_fast.musiclm.config import TrainStageConfig

HELP = "train a stage of MusicLM on a folder of sounds"
_SHORT = {
    "--checkpoint": "mulan",
    "--output": "training.output",
    "--steps": "training.steps",
    "--batch-size": "training.batch_size",
    "--seconds": "data.clip_seconds",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "field data.source", nargs="?", metavar="SOUNDS",
        help="folder of sound files; short for --set data.source=SOUNDS",
    )  # fmt: skip
    _train.add(parser, TrainStageConfig(), _SHORT)


def run(args: argparse.Namespace) -> int:
    """Train a stage of MusicLM on a folder of sound files.

    The first stage that is trained in an output folder also fits the semantic tokenizer, the
    codec and the quantizer of MuLaN's embeddings; the other stages use these. The same
    command resumes a run that was stopped or killed; more steps are another run, unless
    schedule.name is constant.
    """
    values = _train.values(args)

    from pathlib import Path

    from musiclm_fast.musiclm.train_stage import check_same_run, stage_config, train_stage
    from musiclm_fast.training.run_folder import RunFolder, stage_form

    config = stage_config(values)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    stage = args.command.split()[-1]
    if args.resume and not check_same_run(stage, config):
        raise FileNotFoundError(f"resume: no run of {stage} in {config.training.output!r}")
    folder = Path(config.training.output) / stage
    return _train.run(
        lambda: train_stage(stage, config, restart=args.restart),
        lambda: RunFolder(folder, stage_form(stage)).latest() is not None,
    )
