"""``musiclm-fast data check``: problems of a collection, before training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from musiclm_fast._wording import plural
from musiclm_fast.cli._common import add_source, choose_workers

HELP = "read a whole collection and report problems"
SHOWN = 10  # names printed for each reason
WOULD_FAIL = 1


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_source(parser)
    parser.add_argument(
        "--min-seconds",
        type=float,
        default=0.2,
        metavar="S",
        help="training skips shorter sounds (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="the text tower cuts longer captions (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=2, metavar="N", help="training needs at least N sounds"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="reading processes (default: one per core, none for a small collection)",
    )
    parser.add_argument(
        "--all", action="store_true", help=f"list all names, not {SHOWN} per reason"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read every sound and caption of a collection and report what is wrong.

    Exit status: 0 if all sounds can be used, 1 if training would skip some or could not start,
    2 if the source itself is invalid.
    """
    for name in ("max_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected an integer above 0")

    from dataclasses import asdict

    from musiclm_fast.datasets.captioned_sounds import CaptionedSounds
    from musiclm_fast.datasets.check import check_data
    from musiclm_fast.datasets.decoding import need_soundfile
    from musiclm_fast.datasets.sources import list_source

    need_soundfile()
    listing = list_source(args.source, args.kind, audio=args.audio, captions=args.captions)
    # the rate does not matter: nothing is resampled
    sounds = CaptionedSounds(
        listing, sample_hz=16_000, clip_seconds=None, min_seconds=args.min_seconds
    )
    workers = choose_workers(args.workers, len(sounds))
    report = check_data(
        sounds, workers=workers, max_tokens=args.max_tokens, progress=sys.stderr.isatty()
    )
    too_few = report.usable < args.batch_size
    if args.json:
        answer = asdict(report)
        for part in ("failing", "notes"):
            answer[part] = [skip._asdict() for skip in getattr(report, part)]
        print(json.dumps({"source": args.source, **answer}, ensure_ascii=False))
    else:
        _print(args, report)
        if too_few:
            print(f"fewer than a batch of {args.batch_size}: training cannot start")
    return WOULD_FAIL if report.failing or too_few else 0


def _print(args: argparse.Namespace, report: Any) -> None:
    print(
        f"{args.source}: {plural(report.sounds, 'sound')}, {report.usable:,} of them usable; "
        f"{plural(report.captions, 'caption')}, {_clock(report.seconds)} of sound"
    )
    if report.rates:
        print(
            "  rates     " + ", ".join(f"{n:,} x {rate:,} Hz" for rate, n in report.rates.items())
        )
        print("  channels  " + ", ".join(f"{n:,} x {c}" for c, n in report.channels.items()))
        print(
            f"  lengths   {report.shortest:.2f} to {report.longest:.2f} s, "
            f"half of them below {report.median:.2f} s"
        )
    shown = None if args.all else SHOWN
    _print_reasons("training would leave out", report.failing, shown)
    _print_reasons("worth a look", report.notes, shown)


def _print_reasons(title: str, skipped: Sequence[Any], shown: int | None) -> None:
    reasons: dict[str, list[Any]] = {}
    for skip in skipped:
        # what follows "the same" differs from sound to sound
        reason, _, other = skip.reason.partition(" as ")
        same = reason.startswith("the same ")
        name = skip.name if skip.line is None else f"{skip.name} (line {skip.line})"
        key = f"{reason} as another" if same else skip.reason
        reasons.setdefault(key, []).append(f"{name} = {other}" if same else name)
    if reasons:
        print(f"{title}: {len(skipped):,}")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"  {len(names):,} x {reason}")
        for name in names[:shown]:
            print(f"      {name}")
        if shown is not None and len(names) > shown:
            print(f"      and {len(names) - shown:,} more (--all names them)")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
