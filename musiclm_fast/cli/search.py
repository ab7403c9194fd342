"""``musiclm-fast search``: find music files by a text."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from musiclm_fast._wording import plural
from musiclm_fast.cli._common import INTERRUPTED, add_model, load_embedder, shown

if TYPE_CHECKING:
    from musiclm_fast.inference.search_index import Changes, MusicIndex

HELP = "find music in a folder by a text"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", help="folder of sound files, including subfolders")
    parser.add_argument("text", help='what to find, such as "calm piano with strings"')
    parser.add_argument(
        "-k", type=int, default=10, metavar="N", help="number of results (%(default)s)"
    )
    add_model(parser)
    parser.add_argument(
        "--index", metavar="FILE", help="file of the index (default: in the user's cache folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Rank the files of a folder by how well a text describes them.

    The first search embeds the whole folder and saves the index; later ones embed new and changed
    files only. A file is ranked by its best window, whose position is printed.
    """
    if not args.text.strip():
        raise ValueError(f"text: got {args.text!r}, expected words")
    if args.k < 1:
        raise ValueError(f"-k: got {args.k}, expected an integer above 0")

    import json

    index, changes = updated_index(args, args.folder)
    if index is None:
        return INTERRUPTED
    matches = index.search(index.embedder.texts([args.text])[0], args.k)
    if args.json:
        answer = {
            "folder": args.folder,
            "text": args.text,
            "files": len(index.sounds),
            "windows": index.windows(),
            **vars(changes),
            "unreadable": index.failed(),
            "matches": [vars(match) for match in matches],
        }
        print(json.dumps(answer))
        return 0
    for place, match in enumerate(matches, 1):
        span = f"{clock(match.start)}-{clock(match.end)}"
        print(f"{place:>3}  {match.similarity:+.3f}  {span:>13}  {shown(match.name)}")
    return 0


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def updated_index(
    args: argparse.Namespace, folder: str
) -> tuple[MusicIndex | None, Changes | None]:
    """The index of a folder, updated with progress on stderr; None if interrupted."""
    from tqdm import tqdm

    from musiclm_fast.inference.search_index import MusicIndex

    embedder = load_embedder(args)
    index = MusicIndex(folder, embedder, args.index)
    if index.rebuilt:
        print(f"{index.path}: rebuilt, since {index.rebuilt}", file=sys.stderr)
    try:
        with tqdm(desc="indexing", unit="file", leave=False, file=sys.stderr, delay=0.5) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            changes = index.update(show)
    except KeyboardInterrupt:
        print("\nstopped; finished files are saved, the same command resumes", file=sys.stderr)
        return None, None
    failed = index.failed()
    readable = len(index.sounds) - len(failed)
    words = f" ({changes})" if str(changes) else ""
    if index.unsaved:
        print(f"the index could not be written: {index.unsaved}", file=sys.stderr)
    windows = f"{plural(index.windows(), 'window')} of {embedder.window_seconds:g} s"
    print(f"{folder}: {plural(readable, 'file')}{words}, {windows}", file=sys.stderr)
    if failed:
        some = "; ".join(f"{shown(name)}: {reason}" for name, reason in [*failed.items()][:5])
        more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
        print(f"{len(failed)} left out: {some}{more}", file=sys.stderr)
    if not readable:
        raise ValueError(f"folder: got {folder!r}, expected a sound file that can be read")
    return index, changes
