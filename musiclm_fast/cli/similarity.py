"""``musiclm-fast similarity``: how well texts describe a sound file."""

from __future__ import annotations

import argparse
import json

from musiclm_fast._tables import aligned
from musiclm_fast._wording import plural
from musiclm_fast.cli._common import DEFAULT_CHECKPOINT

HELP = "how well texts describe a sound file"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", help="a sound file: wav, flac, ogg, mp3")
    parser.add_argument("text", nargs="+", help="one or more texts to compare with the file")
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT_CHECKPOINT,
        metavar="FILE",
        help="the model (default: %(default)s, which the demo writes)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the cosine similarity of a sound file and each text.

    The file is averaged to mono, resampled to the model's rate and cut into windows of the
    model's clip length, overlapping by half; the mean of their embeddings represents the file.
    """
    for text in args.text:
        if not text.strip():
            raise ValueError(f"text: got {text!r}, expected words")

    import torch
    from torch.nn import functional as F

    from musiclm_fast.audio.reading import read_sound
    from musiclm_fast.audio.windows import cut_windows
    from musiclm_fast.evaluation.metrics import embed_clips, embed_texts
    from musiclm_fast.models.checkpoint import load_mulan

    try:
        mulan, extra = load_mulan(args.checkpoint)
    except FileNotFoundError as error:
        hint = "; `musiclm-fast demo` trains a small model and writes it there"
        raise FileNotFoundError(
            f"{error}{hint if args.checkpoint == DEFAULT_CHECKPOINT else ''}"
        ) from error
    rate = mulan.audio.front_end.sample_hz or extra.get("sample_rate")
    if not rate:
        raise ValueError(f"checkpoint: {args.checkpoint!r} does not contain its sample rate")
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
    count = plural(len(windows), "window")
    print(f"{args.file}: {sound.describe()}; {count} of {seconds:g} s")
    rows = zip(args.text, similarities, strict=True)
    print(aligned([(f"  {text}", f"{value:+.3f}") for text, value in rows]))
    return 0
