"""``musiclm-fast info``: versions, build and backends."""

from __future__ import annotations

import argparse

HELP = "versions, build and backends"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    del parser  # no arguments of its own


def run(args: argparse.Namespace) -> int:
    """Print versions, the build, and which backend of each op runs here."""
    del args
    from musiclm_fast import info

    info.main()
    return 0
