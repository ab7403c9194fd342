"""``musiclm-fast train semantic|coarse|fine``: a stage of MusicLM."""

from __future__ import annotations

import argparse
import sys

from musiclm_fast.cli._common import DEFAULT_CHECKPOINT, DEFAULT_MUSIC, INTERRUPTED

HELP = "train a stage of MusicLM on a folder of sounds"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("sounds", help="a folder of sound files to learn from")
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        metavar="FILE",
        help="the MuLaN, for a new folder of music (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        default=DEFAULT_MUSIC,
        metavar="FOLDER",
        help="where the stages are kept (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="clips per step")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a clip")


def run(args: argparse.Namespace) -> int:
    """Train a stage of MusicLM on a folder of sound files.

    The first stage that is trained in an output folder also fits the semantic tokenizer, the
    codec and the quantizer of MuLaN's embeddings there; the other stages use the same. Ctrl-C
    saves, and the same command goes on; a stage that is done is trained further by more steps.
    """
    stage = args.command.split()[-1]
    if not args.seconds > 0:
        raise ValueError(f"seconds: got {args.seconds}, expected a number above 0")

    from pathlib import Path

    from musiclm_fast.datasets.sound_folder import SoundFolder
    from musiclm_fast.models.checkpoint import load_mulan
    from musiclm_fast.musiclm.project import PARTS, MusicProject

    rate = 16_000
    clips = SoundFolder(args.sounds, rate, max_length=round(args.seconds * rate))
    if (Path(args.output) / PARTS).is_file():
        project = MusicProject(args.output)
    else:
        mulan, extra = load_mulan(args.checkpoint)
        known = mulan.audio.front_end.sample_hz or extra.get("sample_rate")
        if known not in (None, mulan.audio.front_end.sample_hz):
            raise ValueError(
                f"checkpoint: {args.checkpoint!r} hears {known} Hz but cannot resample"
            )
        project = MusicProject(args.output, mulan)
        project.fit([clips[i] for i in range(min(len(clips), 1024))], rate)
    try:
        log = project.train(stage, clips, rate, args.steps, args.batch_size)
    except KeyboardInterrupt:
        print("\nstopped and saved; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(
        f"{stage}: loss {log['loss']:.3f}, in validation {log['valid_loss']:.3f}, "
        f"after {log['steps']} steps, in {args.output}"
    )
    return 0
