"""Files and folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], durable: bool = True) -> Iterator[BinaryIO]:
    """A file for the block to write, next to ``path``; flushed to disk and moved there at the end.

    A crash, an error or a full disk leaves an existing ``path`` untouched. What can be made
    again need not be ``durable``: it is not flushed, which takes milliseconds.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        # mkstemp creates private files; this one gets the permissions of other new files.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write indented JSON by :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder for the block to fill, next to ``path``; flushed to disk and moved there at the end.

    A crash, an error or a full disk leaves an existing ``path`` untouched. An existing
    folder at ``path`` is replaced.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_folder(path)
    try:
        yield temporary
        for file in temporary.iterdir():
            seal(file)
        os.chmod(temporary, 0o777 & ~_umask())
        _sync(temporary)
        if path.exists():
            remove_folder(path, put_in_place=temporary)
        else:
            os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: Path, put_in_place: Path | None = None) -> None:
    """Delete a folder so that its name never shows an incomplete folder."""
    aside = _temporary_folder(path)
    os.rename(path, aside)  # onto an empty folder
    if put_in_place is not None:
        os.rename(put_in_place, path)
    shutil.rmtree(aside)


def remove_leftovers(folder: Path, name: str) -> None:
    """Delete what a killed process left half-written in ``folder`` for names like ``name``.

    Args:
        folder: of the complete files and folders.
        name: the beginning of their names.
    """
    for left in folder.glob(f".{name}*{_SUFFIX}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def point_link(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to ``target`` (relative to its folder), in one step.

    Raises:
        FileExistsError: something other than a link exists there.
    """
    if link.exists() and not link.is_symlink():
        raise FileExistsError(f"{link}: in the way of a link of that name; move it elsewhere")
    temporary = _temporary_folder(link)
    try:
        os.symlink(target, temporary / "link")
        os.replace(temporary / "link", link)
    finally:
        shutil.rmtree(temporary)


def seal(file: Path) -> None:
    """Give a file the permissions of any other new file, and flush it to disk."""
    os.chmod(file, 0o666 & ~_umask())
    _sync(file)


def _temporary_folder(path: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    # A folder's entries are flushed as a file's bytes are.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/musiclm_fast``, or ``~/.cache/musiclm_fast``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "musiclm_fast"
