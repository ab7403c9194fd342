"""``musiclm-fast data convert``: convert a collection to wav files at the model's rate."""

from __future__ import annotations

import argparse
import sys

from musiclm_fast._wording import plural
from musiclm_fast.cli._common import INTERRUPTED, add_source, choose_workers

HELP = "decode and resample a collection once, for faster training"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_source(parser)
    parser.add_argument("folder", help="output folder of manifest.csv and sounds/")
    parser.add_argument(
        "--sample-hz", type=int, default=16_000, metavar="HZ", help="rate (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one per core)"
    )


def run(args: argparse.Namespace) -> int:
    """Write a collection as mono 16-bit wav files at the model's rate, with a manifest.

    Training then needs no decoding. The same command resumes a stopped conversion. Sounds that
    cannot be read are listed and skipped.
    """
    from musiclm_fast.datasets.convert import MANIFEST, convert_data
    from musiclm_fast.datasets.opening import open_dataset, summary

    sounds = open_dataset(
        args.source, sample_hz=args.sample_hz, clip_seconds=None, kind=args.kind,
        audio=args.audio, captions=args.captions,
    )  # fmt: skip
    workers = choose_workers(args.workers, len(sounds))
    try:
        skipped = convert_data(sounds, args.folder, workers=workers, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes the run", file=sys.stderr)
        return INTERRUPTED
    made = len(sounds) + len(sounds.left_out) - len(skipped)
    print(f"{args.folder}/{MANIFEST}: {plural(made, 'sound')} at {args.sample_hz:,} Hz")
    if skipped:
        print(f"left out: {summary(skipped)}")
    return 0
