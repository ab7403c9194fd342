"""``musiclm-fast generate``: music from a text."""

from __future__ import annotations

import argparse

from musiclm_fast.cli._common import DEFAULT_MUSIC

HELP = "generate music from a text"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("text", help="description of the music")
    parser.add_argument("--seconds", type=float, default=10.0, help="length (default: %(default)s)")
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="generate N samples; keep the one that MuLaN ranks first",
    )
    parser.add_argument("-o", "--output", default="music.wav", metavar="FILE", help="wav file")
    parser.add_argument("--all", action="store_true", help="write every sample, best first")
    parser.add_argument(
        "--window-seconds",
        type=float,
        metavar="S",
        help="generate a long piece in windows of S seconds, each continuing the previous one",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="random seed; the same seed gives the same music"
    )
    parser.add_argument(
        "--music",
        default=DEFAULT_MUSIC,
        metavar="FOLDER",
        help="the trained stages (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Generate music for a text with the stages of a folder."""
    if not args.text.strip():
        raise ValueError(f"text: got {args.text!r}, expected words")
    if not args.seconds > 0:
        raise ValueError(f"seconds: got {args.seconds}, expected a number above 0")
    if args.num_samples < 1:
        raise ValueError(f"num-samples: got {args.num_samples}, expected at least 1")
    window = args.window_seconds
    if window is not None and not window > 0:
        raise ValueError(f"window-seconds: got {window}, expected a number above 0")
    if window is not None and args.num_samples > 1:
        raise ValueError(f"num-samples: got {args.num_samples}, expected 1 with --window-seconds")

    from pathlib import Path

    from musiclm_fast._optional import require
    from musiclm_fast.audio.writing import write_wave
    from musiclm_fast.musiclm.project import MusicProject

    require("soundfile")  # before the minutes that sampling takes
    project = MusicProject(args.music)
    if window is not None:
        written = project.musiclm().stream_to_file(
            args.text, args.output, seconds=args.seconds, seed=args.seed,
            window_seconds=window, prime_seconds=window,
        )  # fmt: skip
        print(f"{args.output}: {written:.2f} s")
        return 0
    samples = project.musiclm()(
        args.text, args.num_samples, return_all=True, seconds=args.seconds, seed=args.seed
    )
    output = Path(args.output)
    for index, sample in enumerate(samples if args.all else samples[:1]):
        path = output if index == 0 else output.with_stem(f"{output.stem}-{index + 1}")
        write_wave(path, sample.wave, project.codec.target_sample_hz)
        print(f"{path}: similarity to the text {sample.score:+.3f}")
    return 0
