"""The command ``musiclm-fast``: one function per subcommand, heavy imports inside them.

A subcommand is an ``_add_<name>`` that declares its arguments and a ``run_<name>`` that takes them
parsed and returns an exit status; ``_COMMANDS`` lists them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import musiclm_fast

DEFAULT_CHECKPOINT = "demo-output/mulan.pt"
FAILED, INTERRUPTED = 2, 130


def _add_similarity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a sound file: wav, flac, ogg, mp3")
    parser.add_argument("text", nargs="+", help="one or more texts to compare it with")
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        metavar="FILE",
        help="the model (default: %(default)s, which the demo writes)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_similarity(args: argparse.Namespace) -> int:
    """Print the cosine similarity of a sound file and each text.

    The file is averaged to mono, resampled to the model's rate and cut into windows of the
    model's clip length, overlapping by half; the mean of their embeddings stands for the file.
    """
    for text in args.text:
        if not text.strip():
            raise ValueError(f"text: got {text!r}, expected words")

    import torch
    from torch.nn import functional as F

    from musiclm_fast.training.checkpoint import load_mulan
    from musiclm_fast.training.metrics import embed_clips, embed_texts
    from musiclm_fast.training.sound import cut_windows, read_sound

    try:
        mulan, extra = load_mulan(args.checkpoint)
    except FileNotFoundError as error:
        hint = "; `musiclm-fast demo` trains a small model and writes it there"
        raise FileNotFoundError(
            f"{error}{hint if args.checkpoint == DEFAULT_CHECKPOINT else ''}"
        ) from error
    rate = mulan.audio.front_end.sample_hz or extra.get("sample_rate")
    if not rate:
        raise ValueError(f"checkpoint: {args.checkpoint!r} does not say its sample rate")
    sound = read_sound(args.file, rate)
    seconds = extra.get("clip_seconds", 10.0)
    windows = cut_windows(sound.wav, round(seconds * rate))
    latents = embed_clips(mulan, lambda part: windows[part], len(windows))  # (windows, d)
    clip = F.normalize(latents.mean(dim=0), dim=-1)
    with torch.no_grad():
        similarities = (embed_texts(mulan, args.text) @ clip).tolist()

    if args.json:
        answer = {
            "file": args.file,
            "seconds": round(sound.seconds, 3),
            "windows": len(windows),
            "similarity": dict(zip(args.text, similarities, strict=True)),
        }
        print(json.dumps(answer))
        return 0
    plural = "" if len(windows) == 1 else "s"
    print(f"{args.file}: {sound.describe()}; {len(windows)} window{plural} of {seconds:g} s")
    width = max(len(text) for text in args.text)
    for text, value in zip(args.text, similarities, strict=True):
        print(f"  {text:<{width}}  {value:+.3f}")
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        default="demo-output",
        metavar="FOLDER",
        help="where everything is written (default: %(default)s)",
    )
    parser.add_argument(
        "--instruments",
        type=int,
        metavar="N",
        help="how many of the 128 instruments, evenly spaced",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    parser.add_argument("--seed", type=int, metavar="N", help="of every random draw")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="train anew, even where a stopped or finished run could go on",
    )


def run_demo(args: argparse.Namespace) -> int:
    """Train a small MuLaN on rendered instruments and report what it learned."""
    from musiclm_fast.training.demo import DemoConfig, run_demo

    chosen = {name: getattr(args, name) for name in ("instruments", "steps", "seed")}
    config = DemoConfig(**{name: value for name, value in chosen.items() if value is not None})
    try:
        run_demo(args.output, config, restart=args.restart)
    except KeyboardInterrupt:
        print("\nstopped and saved; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


DEFAULT_MUSIC = "music-output"


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=("semantic", "coarse", "fine"), help="which stage")
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


def run_train(args: argparse.Namespace) -> int:
    """Train a stage of MusicLM on a folder of sound files.

    The first stage that is trained in an output folder also fits the semantic tokenizer, the
    codec and the quantizer of MuLaN's embeddings there; the other stages use the same.
    """
    if not args.seconds > 0:
        raise ValueError(f"seconds: got {args.seconds}, expected a number above 0")

    from pathlib import Path

    from musiclm_fast.training.checkpoint import load_mulan
    from musiclm_fast.training.music import PARTS, MusicProject
    from musiclm_fast.training.stages import SoundFolder

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
    loss = project.train(args.stage, clips, rate, args.steps, args.batch_size)
    print(f"{args.stage}: loss {loss:.3f} after {args.steps} steps, in {args.output}")
    return 0


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help="what the music should be")
    parser.add_argument("--seconds", type=float, default=10.0, help="length (default: %(default)s)")
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="draw N, keep MuLaN's favourite"
    )
    parser.add_argument("-o", "--output", default="music.wav", metavar="FILE", help="wav file")
    parser.add_argument("--all", action="store_true", help="write every sample, best first")
    parser.add_argument("--seed", type=int, metavar="N", help="for the same music again")
    parser.add_argument(
        "--music",
        default=DEFAULT_MUSIC,
        metavar="FOLDER",
        help="the trained stages (default: %(default)s)",
    )


def run_generate(args: argparse.Namespace) -> int:
    """Generate music for a text with the stages of a folder."""
    if not args.text.strip():
        raise ValueError(f"text: got {args.text!r}, expected words")
    if not args.seconds > 0:
        raise ValueError(f"seconds: got {args.seconds}, expected a number above 0")
    if args.num_samples < 1:
        raise ValueError(f"num-samples: got {args.num_samples}, expected at least 1")

    from pathlib import Path

    from musiclm_fast.training.music import MusicProject, write_wave

    project = MusicProject(args.music)
    samples = project.musiclm()(
        args.text, args.num_samples, return_all=True, seconds=args.seconds, seed=args.seed
    )
    output = Path(args.output)
    for index, sample in enumerate(samples if args.all else samples[:1]):
        path = output if index == 0 else output.with_stem(f"{output.stem}-{index + 1}")
        write_wave(path, sample.wave, project.codec.target_sample_hz)
        print(f"{path}: similarity to the text {sample.score:+.3f}")
    return 0


def _add_info(parser: argparse.ArgumentParser) -> None:
    del parser  # no arguments of its own


def run_info(args: argparse.Namespace) -> int:
    """Print versions, the build, and which backend of each op runs here."""
    del args
    from musiclm_fast import info

    info.main()
    return 0


_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]

# name: (one line of help, arguments, function)
_COMMANDS: dict[str, tuple[str, _Add, _Run]] = {
    "demo": ("train a small MuLaN on real audio, here and now", _add_demo, run_demo),
    "similarity": ("how well texts describe a sound file", _add_similarity, run_similarity),
    "train": ("train a stage of MusicLM on a folder of sounds", _add_train, run_train),
    "generate": ("music for a text", _add_generate, run_generate),
    "info": ("versions, build and backends", _add_info, run_info),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="musiclm-fast", description="Joint embeddings of music and text: train one, ask one."
    )
    parser.add_argument("--version", action="version", version=musiclm_fast.__version__)
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error arose, not only what it says"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, add, run) in _COMMANDS.items():
        options: dict[str, Any] = dict(help=summary, description=run.__doc__)
        command = commands.add_parser(name, **options)
        add(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments; None takes the process's own.

    Returns:
        0, or 2 after an error, which is printed to stderr in one line.
    """
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        if args.traceback:
            raise
        print(f"musiclm-fast {args.command}: error: {error}", file=sys.stderr)
        return FAILED
    return status


if __name__ == "__main__":
    sys.exit(main())
