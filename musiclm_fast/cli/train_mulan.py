"""``musiclm-fast train mulan``: a MuLaN on sounds and captions of one's own."""

from __future__ import annotations

import argparse
import sys

from musiclm_fast._config import help_text, read_config, to_yaml
from musiclm_fast.cli._common import INTERRUPTED
from musiclm_fast.training.mulan_config import TrainMuLaNConfig

HELP = "train a MuLaN on sounds and captions of your own"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--config", metavar="FILE", help="YAML with fields of those listed below")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="one field, before the file's, as in --set training.steps=100; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration and do nothing"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="fail where there is no run to go on with (a run in training.output goes on anyway)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete the checkpoints and the log of an earlier run in training.output",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"fields of the configuration:\n\n{help_text(TrainMuLaNConfig())}"


def run(args: argparse.Namespace) -> int:
    """Train a MuLaN on captioned sounds.

    A run that was stopped or killed goes on with the same command. Several processes:
    torchrun --nproc-per-node 8 -m musiclm_fast train mulan --config FILE
    """
    config = read_config(TrainMuLaNConfig, args.config, args.set)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    if args.resume and args.restart:
        raise ValueError("resume, restart: got both, expected at most one")

    from musiclm_fast.training.train_mulan import check_same_run, train_mulan

    if args.resume and not check_same_run(config):
        raise FileNotFoundError(f"resume: no run in {config.training.output!r}")
    try:
        train_mulan(config, restart=args.restart)
    except KeyboardInterrupt:
        print("\nstopped and saved; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0
