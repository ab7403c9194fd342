"""``musiclm-fast train mulan``: train a MuLaN on captioned sounds."""

from __future__ import annotations

import argparse

from musiclm_fast._config import from_plain, to_yaml
from musiclm_fast.cli import _train
from musiclm_fast.training.mulan_config import TrainMuLaNConfig

HELP = "train a MuLaN on captioned sounds"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    _train.add(parser, TrainMuLaNConfig(), {})


def run(args: argparse.Namespace) -> int:
    """Train a MuLaN on captioned sounds.

    The same command resumes a run that was stopped or killed. Several processes:
    torchrun --nproc-per-node 8 -m musiclm_fast train mulan --config FILE
    """
    config = from_plain(TrainMuLaNConfig(), _train.values(args))
    if args.print_config:
        print(to_yaml(config), end="")
        return 0

    from musiclm_fast.training.configured_run import check_same_run
    from musiclm_fast.training.run_folder import RunFolder
    from musiclm_fast.training.train_mulan import train_mulan

    if args.resume and not check_same_run(config, config.training.output):
        raise FileNotFoundError(f"resume: no run in {config.training.output!r}")
    return _train.run(
        lambda: train_mulan(config, restart=args.restart),
        lambda: RunFolder(config.training.output).latest() is not None,
    )
