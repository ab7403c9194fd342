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
        help="manifest, musiccaps, folder or webdataset (default: detect)",
    )
    parser.add_argument("--audio", metavar="FOLDER", help="sound files not next to the manifest")
    parser.add_argument(
        "--captions",
        choices=("names", "tags"),
        help="for a folder without a manifest: captions from file names or tags",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that determine how sounds are embedded."""
    parser.add_argument(
        "--model",
        default=DEFAULT_CHECKPOINT,
        metavar="PATH",
        help="the model: a checkpoint's file or folder (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help="window length (default: the model's clip length)",
    )
    parser.add_argument(
        "--stride",
        type=float,
        metavar="SECONDS",
        help="step between windows (default: the window length)",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="windows per batch")


def load_embedder(args: argparse.Namespace) -> Embedder:
    """The model given by :func:`add_model`'s arguments."""
    from musiclm_fast.inference.embedder import Embedder

    try:
        return Embedder.load(args.model, args.window, args.stride, args.batch_size)
    except FileNotFoundError as error:
        hint = "; `musiclm-fast demo` trains a small model and writes it there"
        raise FileNotFoundError(
            f"{error}{hint if args.model == DEFAULT_CHECKPOINT else ''}"
        ) from error


def choose_workers(asked: int | None, sounds: int) -> int:
    """Number of reading processes: as requested, else one per core for larger collections."""
    if asked is not None:
        if asked < 0:
            raise ValueError(f"workers: got {asked}, expected 0 or more")
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) if (cores or 1) > 1 and sounds >= 16 else 0


def shown(name: str) -> str:
    """A file name, which may contain any bytes, as printable text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
