"""``musiclm-fast info``: versions, build and backends."""

from __future__ import annotations

import argparse

from musiclm_fast import info

HELP = info.HELP


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--check", action="store_true", help=info.CHECK_HELP)


def run(args: argparse.Namespace) -> int:
    """Print versions, the build, and which backend of each op runs here, or check the kernels."""
    return info.main(["--check"] if args.check else [])
