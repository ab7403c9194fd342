"""The command ``musiclm-fast``: one module per subcommand, heavy imports inside its ``run``.

A subcommand's module has ``HELP``, one line; ``add(parser)``, which declares its arguments; and
``run(args)``, which takes them parsed and returns an exit status. ``_COMMANDS`` lists them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from musiclm_fast._version import __version__
from musiclm_fast.cli._common import FAILED, INTERRUPTED

# command: its module in this package
_COMMANDS = {
    "demo": "demo",
    "demo-music": "demo_music",
    "similarity": "similarity",
    "data check": "data_check",
    "data titles": "data_titles",
    "data convert": "data_convert",
    "search": "search",
    "embed": "embed",
    "eval": "eval",
    "train mulan": "train_mulan",
    "train semantic": "train_stage",
    "train coarse": "train_stage",
    "train fine": "train_stage",
    "generate": "generate",
    "convert": "convert",
    "plan": "plan",
    "info": "info",
}
_GROUPS = {
    "data": "check, list or convert a music collection",
    "train": "train a MuLaN or a stage of MusicLM",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="musiclm-fast",
        description="Train, evaluate and use MuLaN and MusicLM.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="print the traceback of an error")
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True)
    groups: dict[str, Any] = {}
    for words, name in _COMMANDS.items():
        module = importlib.import_module(f"musiclm_fast.cli.{name}")
        group, _, last = words.rpartition(" ")
        if group and group not in groups:
            grouped = commands.add_parser(
                group,
                help=_GROUPS[group],
                description=f"{_GROUPS[group][0].upper()}{_GROUPS[group][1:]}.",
            )
            groups[group] = grouped.add_subparsers(metavar="WHAT", required=True)
        command = (groups[group] if group else commands).add_parser(
            last, help=module.HELP, description=module.run.__doc__
        )
        module.add(command)
        command.set_defaults(run=module.run, command=words)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0, 2 after an error, which is printed to stderr in one line, or 130 when interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if args.traceback:
            raise
        print(f"musiclm-fast {args.command}: error: {error}", file=sys.stderr)
        return FAILED
    return status
