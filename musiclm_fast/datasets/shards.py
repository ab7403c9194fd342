"""webdataset shards: tar files whose members KEY.wav and KEY.txt or KEY.json belong together.

A shard's index (the positions and captions of its sounds) is cached and reused while the shard's
size and modification time are the same, so only new shards are read.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from musiclm_fast._checks import fail
from musiclm_fast._files import atomic_file
from musiclm_fast.datasets.listing import AUDIO_SUFFIXES, Entry, Listing, Skipped, captions_of

_FORMAT = 1


_CAPTION_KEYS = ("caption", "captions", "text")


_LARGEST_TEXT = 1 << 20  # bytes of a .txt or .json member


def shard_paths(pattern: str) -> list[str]:
    """Tar files of a folder, a glob pattern, or a pattern in braces, sorted.

    ``{000..012}`` counts, with as many digits as written; ``{a,b}`` lists.

    Raises:
        FileNotFoundError: there are none, or one that the braces name is missing.
    """
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    if os.path.isfile(pattern):
        return [pattern]
    found: list[str] = []
    for part in _expand(pattern):
        if set(part) & set("*?["):
            found += glob.glob(part)
        elif os.path.isfile(part):
            found.append(part)
        else:
            raise FileNotFoundError(f"source: no shard {part!r}, named by {pattern!r}")
    if not found:
        raise FileNotFoundError(f"source: no shards at {pattern!r}")
    return sorted(dict.fromkeys(found))


def _expand(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if counted:
        first, last = int(counted[1]), int(counted[2])
        choices = [f"{n:0{len(counted[1])}d}" for n in range(first, last + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _expand(pattern[: match.start()] + choice + pattern[match.end() :])


def list_shards(pattern: str, cache_folder: str | os.PathLike[str] | None = None) -> Listing:
    """List the sounds of all shards.

    Args:
        pattern: see :func:`shard_paths`.
        cache_folder: folder of the indices; None is ``shards`` in musiclm_fast's cache folder.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: a shard is compressed or no tar file.
    """
    from tqdm.auto import tqdm

    paths = shard_paths(pattern)
    if cache_folder is None:
        from musiclm_fast._files import default_cache_folder

        cache_folder = default_cache_folder() / "shards"
    listing = Listing()
    # show the bar only if it takes long
    for path in tqdm(paths, "reading shards", unit="shard", delay=2, leave=False):
        shard = os.path.basename(path)
        index = _index(path, Path(cache_folder))
        for key, offset, size, captions in index["sounds"]:
            entry = Entry(f"{shard}/{key}", path, captions, offset=offset, size=size)
            listing.entries.append(entry)
        listing.left_out += [Skipped(f"{shard}/{key}", why) for key, why in index["left_out"]]
    return listing


def _index(path: str, cache_folder: Path) -> dict[str, Any]:
    absolute = os.path.abspath(path)
    state = os.stat(absolute)
    stamp = [_FORMAT, absolute, state.st_size, state.st_mtime_ns]
    name = hashlib.blake2b(absolute.encode(), digest_size=16).hexdigest()
    cached = cache_folder / f"{name}.json"
    try:
        index = json.loads(cached.read_text(encoding="utf-8"))
        if index["stamp"] == stamp:
            return dict(index)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or damaged: read the shard
    index = {"stamp": stamp, **_read_index(path)}
    # a cache that cannot be written only costs time
    with contextlib.suppress(OSError), atomic_file(cached) as file:
        file.write(json.dumps(index).encode())
    return index


def _read_index(path: str) -> dict[str, Any]:
    sounds: dict[str, tuple[int, int]] = {}
    texts: dict[str, list[str] | None] = {}
    keys: dict[str, None] = {}  # in the order of the shard
    left_out: list[tuple[str, str]] = []
    try:
        # uncompressed: members are read at their offsets
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    if not member.isfile() or base.startswith("."):
                        continue
                    stem, _, extension = base.partition(".")
                    extension = extension.lower()
                    key = f"{folder}/{stem}" if folder else stem
                    if f".{extension}" in AUDIO_SUFFIXES:
                        sounds[key] = (member.offset_data, member.size)
                    elif extension in ("txt", "json") and member.size <= _LARGEST_TEXT:
                        content = tar.extractfile(member)
                        assert content is not None  # it is a file
                        texts[key] = _captions(content.read(), extension, texts.get(key))
                    else:
                        continue
                    keys[key] = None
            except (tarfile.ReadError, EOFError) as error:
                left_out.append(("the rest", f"the shard is damaged or cut short: {error}"))
    except tarfile.ReadError as error:
        fail(f"source: shard {path!r}", f"no plain tar file ({error})", "an uncompressed .tar")
    size = os.path.getsize(path)
    found = []
    for key in keys:
        captions = texts.get(key)
        if key not in sounds:
            left_out.append((key, "no sound of that key"))
        elif key not in texts:
            left_out.append((key, "no .txt or .json of that key"))
        elif captions is None:
            left_out.append((key, f".json has none of {', '.join(_CAPTION_KEYS)}"))
        elif not captions:
            left_out.append((key, "empty caption"))
        elif sum(sounds[key]) > size:
            left_out.append((key, "the shard is cut short"))
        else:
            found.append((key, *sounds[key], captions))
    return {"sounds": found, "left_out": left_out}


def _captions(data: bytes, extension: str, known: list[str] | None) -> list[str] | None:
    text = data.decode("utf-8", errors="replace")
    if extension == "txt":
        return (known or []) + [text.strip()] * bool(text.strip())
    try:
        content = json.loads(text)
    except ValueError:
        return known
    if isinstance(content, dict):
        for name in _CAPTION_KEYS:
            if name in content:
                return (known or []) + (captions_of(content[name]) or [])
    return known
