"""``musiclm-fast embed``: embeddings of sounds, in a file."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musiclm_fast._wording import plural
from musiclm_fast.cli._common import INTERRUPTED, add_model, add_source, load_embedder
from musiclm_fast.cli.search import updated_index

if TYPE_CHECKING:
    from musiclm_fast.inference.embedder import Embedded, Embedder

HELP = "write embeddings of sounds (and captions) to a file"
_SUFFIXES = (".npz", ".safetensors")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_source(parser, "a folder of sound files, or captioned sounds as for `eval`")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="output file, .npz or .safetensors"
    )
    add_model(parser)
    parser.add_argument(
        "--index", metavar="FILE", help="index of a folder of sound files, as for `search`"
    )


def run(args: argparse.Namespace) -> int:
    """Write the embeddings of sounds to a file.

    The file contains names; audio (sounds, d), a unit vector for each sound; windows (windows, d);
    window_sound, the sound of each window; window_start, in seconds. With captions also texts,
    text (captions, d) and text_sound. In safetensors the strings are JSON in the header. A folder
    without a manifest is embedded as by `search`, with the same index.
    """
    output = Path(args.output)
    if output.suffix not in _SUFFIXES:
        raise ValueError(
            f"output: got {args.output!r}, expected a name in {' or '.join(_SUFFIXES)}"
        )
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        raise FileNotFoundError(f"output: no folder {str(output.parent)!r} to write to")

    import numpy as np

    captions: list[list[str]] = []
    if _plain_folder(args):
        index, _ = updated_index(args, args.source)
        if index is None:
            return INTERRUPTED
        embedder = index.embedder
        names = [name for name in sorted(index.sounds) if name not in index.failed()]
        found = [index.sounds[name].embedded for name in names]
    else:
        embedder = load_embedder(args)
        names, found, captions = _captioned(args, embedder)
    counts = [len(own.starts) for own in found]
    arrays = {
        "audio": np.stack([own.mean() for own in found]),
        "windows": np.concatenate([own.latents for own in found]),
        "window_sound": np.repeat(np.arange(len(names)), counts),
        "window_start": np.concatenate([own.starts for own in found]),
    }
    strings = {"names": names}
    if captions:
        texts = [text for own in captions for text in own]
        arrays["text"] = embedder.texts(texts).numpy()
        arrays["text_sound"] = np.repeat(np.arange(len(names)), [len(own) for own in captions])
        strings["texts"] = texts
    _write(output, arrays, strings)
    windows = plural(len(arrays["windows"]), "window")
    print(f"{output}: {plural(len(names), 'sound')}, {windows}")
    return 0


def _plain_folder(args: argparse.Namespace) -> bool:
    # A folder of sound files without captions.
    if args.captions is not None or args.kind != "auto" or not os.path.isdir(args.source):
        return False
    from musiclm_fast.datasets.tables import is_table

    names = os.listdir(args.source)
    return not any(is_table(name) or name.lower().endswith(".tar") for name in names)


def _captioned(
    args: argparse.Namespace, embedder: Embedder
) -> tuple[list[str], list[Embedded], list[list[str]]]:
    # names, windows and captions of the sounds that can be read
    from tqdm import tqdm

    from musiclm_fast.datasets.opening import open_dataset

    sounds = open_dataset(
        args.source, sample_hz=embedder.sample_hz, clip_seconds=None, kind=args.kind,
        audio=args.audio, captions=args.captions,
    )  # fmt: skip
    rows = tqdm(
        embedder.sounds(sounds), total=len(sounds), desc="embedding", unit="sound", leave=False,
        delay=0.5,
    )  # fmt: skip
    names, found, captions = [], [], []
    for index, embedded in rows:
        name = sounds.name(index)
        if embedded.reason:
            print(f"left out {name}: {embedded.reason}", file=sys.stderr)
            continue
        names.append(name)
        found.append(embedded)
        captions.append(sounds.captions(index))
    if not found:
        raise ValueError(f"source: got {args.source!r}, expected a sound that can be read")
    return names, found, captions


def _write(path: Path, arrays: dict[str, Any], strings: dict[str, list[str]]) -> None:
    import json

    import numpy as np

    from musiclm_fast._files import atomic_file

    with atomic_file(path) as file:
        if path.suffix == ".npz":
            texts = {name: np.array(own) for name, own in strings.items()}
            np.savez(file, **arrays, **texts)  # type: ignore[arg-type]
        else:
            from safetensors.numpy import save

            metadata = {name: json.dumps(own) for name, own in strings.items()}
            file.write(save(arrays, metadata=metadata))
