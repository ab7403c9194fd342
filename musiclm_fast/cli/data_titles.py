"""``musiclm-fast data titles``: a manifest of a music folder, with titles as captions."""

from __future__ import annotations

import argparse
import sys

from musiclm_fast._wording import plural

HELP = "write a manifest of a music folder, with titles as captions"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", help="folder of sound files, including subfolders")
    parser.add_argument(
        "--captions",
        choices=("tags", "names"),
        default="tags",
        help="title and genre of a file's tags, else its name (default); or its name",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the manifest, a .csv file (default: print it, with paths relative to the folder)",
    )


def run(args: argparse.Namespace) -> int:
    """Write a csv manifest, path and caption, of a folder of sound files.

    The captions are a starting point for editing: a file's title and, if its tags have a genre,
    the title with the genre.
    """
    import io
    import os

    from musiclm_fast._files import atomic_file
    from musiclm_fast.datasets.titles import write_manifest

    if not os.path.isdir(args.folder):
        raise FileNotFoundError(f"folder: no folder {args.folder!r}")
    if args.output is None:
        text = io.StringIO()
        write_manifest(text, args.folder, args.captions)
        sys.stdout.write(text.getvalue())
        return 0
    if not args.output.lower().endswith(".csv"):
        raise ValueError(f"output: got {args.output!r}, expected a name that ends in .csv")
    text = io.StringIO()
    beside = os.path.dirname(os.path.abspath(args.output))
    rows = write_manifest(text, args.folder, args.captions, relative_to=beside)
    with atomic_file(args.output) as file:
        file.write(text.getvalue().encode())
    print(f"{args.output}: {plural(rows, 'sound')}", file=sys.stderr)
    return 0
