"""Sources of captioned sounds: manifests, MusicCaps, folders and webdataset shards.

Each reader returns a :class:`Listing`: the sounds that can be drawn, and the others with the
reason. Nothing is decoded here.
"""

from __future__ import annotations

import os

from musiclm_fast._checks import check_choice, fail
from musiclm_fast._wording import plural
from musiclm_fast.datasets.listing import Listing, sound_files
from musiclm_fast.datasets.tables import (
    columns_of,
    find_manifest,
    is_table,
    list_manifest,
    list_musiccaps,
)
from musiclm_fast.datasets.titles import CAPTIONS, list_folder

KINDS = ("auto", "manifest", "musiccaps", "folder", "webdataset")


def list_source(
    source: str | os.PathLike[str],
    kind: str = "auto",
    *,
    audio: str | os.PathLike[str] | None = None,
    captions: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
) -> Listing:
    """List a source; see :func:`musiclm_fast.datasets.opening.open_dataset` for the arguments.

    Raises:
        FileNotFoundError: there is nothing at ``source``.
        ValueError: unknown kind, or a column is missing.
    """
    check_choice("kind", kind, KINDS)
    if captions is not None:
        check_choice("captions", captions, CAPTIONS)
    text = os.fspath(source)
    if audio is not None and not os.path.isdir(audio):
        raise FileNotFoundError(f"audio: no folder {os.fspath(audio)!r}")
    if text.startswith(("pipe:", "http:", "https:", "s3:", "gs:", "hf:")):
        fail("source", repr(text), "a file or folder of this machine: download it first")
    if kind == "auto":
        kind = _guess_kind(text, captions)
    if kind == "webdataset":
        from musiclm_fast.datasets.shards import list_shards

        return list_shards(text, cache_folder)
    if not os.path.exists(text):
        raise FileNotFoundError(f"source: nothing at {text!r}")
    if kind == "folder":
        if not os.path.isdir(text):
            fail("source", f"{text!r}, no folder", "a folder for kind='folder'")
        return list_folder(text, captions or "names")
    table = text
    if os.path.isdir(text):
        found = find_manifest(text)
        if found is None:
            fail("source", f"{text!r}, which holds no manifest", f"a file for kind={kind!r}")
        table = found
    return list_musiccaps(table, audio) if kind == "musiccaps" else list_manifest(table, audio)


def _guess_kind(text: str, captions: str | None) -> str:
    if text.endswith(".tar") or (not os.path.exists(text) and set(text) & set("*?[{")):
        return "webdataset"
    if os.path.isfile(text):
        if not is_table(text):
            fail("source", repr(text), "a folder, or a file .csv, .tsv, .jsonl or .tar")
        return "musiccaps" if "ytid" in columns_of(text) else "manifest"
    if not os.path.isdir(text):
        raise FileNotFoundError(f"source: nothing at {text!r}")
    if captions is not None:
        return "folder"
    table = find_manifest(text)
    if table is not None:
        return "musiccaps" if "ytid" in columns_of(table) else "manifest"
    if any(name.endswith(".tar") for name in os.listdir(text)):
        return "webdataset"
    found = plural(len(sound_files(text)), "sound file")
    raise ValueError(
        f"source: got the folder {text!r} with {found}, no manifest "
        "and no .tar, expected a manifest in it (csv or jsonl with path and caption; "
        "`musiclm-fast data titles` makes one of titles), or captions='names' or 'tags'"
    )
