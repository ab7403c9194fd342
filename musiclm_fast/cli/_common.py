"""Arguments, defaults and exit statuses that several subcommands share."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from musiclm_fast.inference.embedder import Embedder

DEFAULT_CHECKPOINT = "demo-output/mulan.pt"
DEFAULT_MUSIC = "music-output"
FAILED, INTERRUPTED = 2, 130


_COLLECTION = (
    "a manifest (csv, tsv, jsonl with path and caption), MusicCaps' csv, a folder with one of "
    "these, or webdataset shards (a .tar, a folder or a quoted pattern of them)"
)


def add_source(parser: argparse.ArgumentParser, collection: str = _COLLECTION) -> None:
    """Declare the arguments that name a collection."""
    parser.add_argument("source", help=collection)
    parser.add_argument(
        "--kind",
        default="auto",
        metavar="KIND",
        help="manifest, musiccaps, folder or webdataset (default: look)",
    )
    parser.add_argument("--audio", metavar="FOLDER", help="the sounds, if not beside the manifest")
    parser.add_argument(
        "--captions",
        choices=("names", "tags"),
        help="a folder without a manifest: captions from the files' names or their tags",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say how sounds are embedded."""
    parser.add_argument(
        "--model",
        default=DEFAULT_CHECKPOINT,
        metavar="PATH",
        help="the model: a checkpoint's file or folder (default: %(default)s)",
    )
    parser.add_argument(
        "--window", type=float, metavar="SECONDS", help="default: the length of the model's clips"
    )
    parser.add_argument(
        "--stride", type=float, metavar="SECONDS", help="between windows; default: the window"
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows at once")


def load_embedder(args: argparse.Namespace) -> Embedder:
    """The model that :func:`add_model`'s arguments ask for."""
    from musiclm_fast.inference.embedder import Embedder

    try:
        return Embedder.load(args.model, args.window, args.stride, args.batch_size)
    except FileNotFoundError as error:
        hint = "; `musiclm-fast demo` trains a small model and writes it there"
        raise FileNotFoundError(
            f"{error}{hint if args.model == DEFAULT_CHECKPOINT else ''}"
        ) from error


def choose_workers(asked: int | None, sounds: int) -> int:
    """How many processes read: what was asked for, else one per core where it pays."""
    if asked is not None:
        if asked < 0:
            raise ValueError(f"workers: got {asked}, expected 0 or more")
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) if (cores or 1) > 1 and sounds >= 16 else 0


def shown(name: str) -> str:
    """A file's name, which may be any bytes, as text that can be printed."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
