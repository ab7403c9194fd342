"""``musiclm-fast demo-music``: from the demo's MuLaN to sound."""

from __future__ import annotations

import argparse
import sys

from musiclm_fast.cli._common import DEFAULT_CHECKPOINT, INTERRUPTED

HELP = "train a small MusicLM on the demo's MuLaN and generate music"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--output",
        default="demo-output/music",
        metavar="FOLDER",
        help="output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        metavar="FILE",
        help="the MuLaN that `musiclm-fast demo` wrote (default: %(default)s)",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help="samples per prompt; the one that MuLaN ranks first is kept",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="random seed")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="discard an earlier run instead of resuming it",
    )


def run(args: argparse.Namespace) -> int:
    """Train three small stages on melodies of rendered instruments, generate, and evaluate.

    The prompts name 32 instruments in sentences that training did not use. An instrument
    classifier, fitted to real melodies and independent of MuLaN, evaluates the generated clips.
    """
    from musiclm_fast.demo.music_demo import run_music_demo
    from musiclm_fast.demo.music_run import MusicDemoConfig

    chosen = {name: getattr(args, name) for name in ("num_samples", "seed")}
    config = MusicDemoConfig(**{k: value for k, value in chosen.items() if value is not None})
    try:
        run_music_demo(args.output, config, checkpoint=args.checkpoint, restart=args.restart)
    except FileNotFoundError as error:
        if args.checkpoint != DEFAULT_CHECKPOINT or DEFAULT_CHECKPOINT not in str(error):
            raise
        raise FileNotFoundError(f"{error}; `musiclm-fast demo` trains one") from error
    except KeyboardInterrupt:
        print("\nstopped and saved; the same command resumes the run", file=sys.stderr)
        return INTERRUPTED
    return 0
