"""Shared by the ``train`` commands: configurations from a file and the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from musiclm_fast._config import help_text, read_values
from musiclm_fast.cli._common import INTERRUPTED


def add(parser: argparse.ArgumentParser, config: Any, short: dict[str, str]) -> None:
    """Declare the arguments.

    Args:
        parser: of the command.
        config: the defaults.
        short: option: the field that it abbreviates.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file with fields listed below")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="set one field; overrides the file, such as --set training.steps=100; repeatable",
    )  # fmt: skip
    for option, path in short.items():
        parser.add_argument(
            option, metavar="VALUE", dest=f"field {path}", help=f"short for --set {path}=VALUE"
        )
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration and exit"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="fail if there is no run to resume (an existing run is always resumed)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="delete an earlier run's checkpoints and log"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"fields of the configuration:\n\n{help_text(config)}"


def values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields set by the file and the command line, as nested dictionaries."""
    if args.resume and args.restart:
        raise ValueError("resume, restart: got both, expected at most one")
    given = [
        f"{name.removeprefix('field ')}={value}"
        for name, value in vars(args).items()
        if name.startswith("field ") and value is not None
    ]
    return read_values(args.config, [*given, *args.set])


def run(train: Callable[[], Any], saved: Callable[[], bool]) -> int:
    """Train. Ctrl-C is not an error: the run is saved.

    Args:
        train: the work.
        saved: whether a run can be resumed.
    """
    try:
        train()
    except KeyboardInterrupt:
        done = "stopped and saved; the same command resumes the run" if saved() else "stopped"
        print(f"\n{done}", file=sys.stderr)
        return INTERRUPTED
    return 0
