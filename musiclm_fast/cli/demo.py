"""``musiclm-fast demo``: train a small MuLaN on rendered instruments."""

from __future__ import annotations

import argparse
import sys

from musiclm_fast.cli._common import INTERRUPTED

HELP = "train a small MuLaN on rendered instruments"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--output",
        default="demo-output",
        metavar="FOLDER",
        help="output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--instruments",
        type=int,
        metavar="N",
        help="number of instruments, evenly spaced over the 128 programs",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="discard an earlier run instead of resuming it",
    )


def run(args: argparse.Namespace) -> int:
    """Train a small MuLaN on rendered instruments and report what it learned."""
    from musiclm_fast.demo.mulan_demo import run_demo
    from musiclm_fast.demo.mulan_run import DemoConfig

    chosen = {name: getattr(args, name) for name in ("instruments", "steps", "seed")}
    config = DemoConfig(**{name: value for name, value in chosen.items() if value is not None})
    try:
        run_demo(args.output, config, restart=args.restart)
    except KeyboardInterrupt:
        print("\nstopped and saved; the same command resumes the run", file=sys.stderr)
        return INTERRUPTED
    return 0
