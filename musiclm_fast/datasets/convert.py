"""Convert sounds once to mono wav files at the model's rate, which need no decoding.

Drawing ten seconds from a 44.1 kHz stereo ogg or mp3 file takes 13 to 20 ms of a core, from a mono
wav file at the model's rate 0.7 ms.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from musiclm_fast._checks import fail
from musiclm_fast._files import atomic_file
from musiclm_fast._optional import require
from musiclm_fast.datasets.captioned_sounds import CaptionedSounds, Skipped
from musiclm_fast.datasets.decoding import UnreadableSoundError
from musiclm_fast.datasets.titles import title_of

MANIFEST = "manifest.csv"


class _Conversions(Dataset[Any]):
    # Row i writes sound i and is its file's name, or the error.
    def __init__(self, sounds: CaptionedSounds, folder: Path) -> None:
        self.sounds, self.folder = sounds, folder

    def __len__(self) -> int:
        return len(self.sounds)

    def __getitem__(self, index: int) -> str | UnreadableSoundError | OSError:
        name = _file_name(self.sounds.name(index))
        path = self.folder / name
        try:
            if not _is_there(path, self.sounds.sample_hz):
                _write_wav(path, self.sounds, index)
        except (UnreadableSoundError, OSError) as error:
            return error
        return name


def _file_name(name: str) -> str:
    # Readable, unique, the same in every run; spread over 256 folders.
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    words = re.sub(r"[^\w-]+", "-", title_of(name)).strip("-")[:60]
    return f"sounds/{digest[:2]}/{words}-{digest}.wav"


def _is_there(path: Path, sample_hz: int) -> bool:
    soundfile = require("soundfile")

    try:
        found = soundfile.info(str(path))
    except soundfile.SoundFileError:
        return False
    return bool(found.samplerate == sample_hz and found.frames)


def _write_wav(path: Path, sounds: CaptionedSounds, index: int) -> None:
    soundfile = require("soundfile")

    wav = sounds.whole(index).wav.clamp(-1, 1).numpy()  # resampling overshoots a little
    content = io.BytesIO()
    soundfile.write(content, wav, sounds.sample_hz, format="WAV", subtype="PCM_16")
    with atomic_file(path, durable=False) as file:
        file.write(content.getbuffer())


def convert_data(
    sounds: CaptionedSounds,
    folder: str | os.PathLike[str],
    *,
    workers: int = 0,
    progress: bool = False,
) -> list[Skipped]:
    """Write every sound as a mono 16-bit wav at ``sounds.sample_hz``, and a manifest of them.

    A stopped conversion resumes: existing files at that rate are kept.

    Args:
        sounds: the collection, with ``clip_seconds=None``.
        folder: output, ``manifest.csv`` (path, caption) and ``sounds/``.
        workers: processes that convert; 0 converts in this one.
        progress: show a bar on stderr.

    Returns:
        Sounds that are not in the manifest, and why.

    Raises:
        ValueError: sounds are cropped, or none can be read.
        OSError: a file could not be written.
    """
    if sounds.clip_seconds is not None:
        fail("sounds", f"clips of {sounds.clip_seconds} s", "whole sounds (clip_seconds=None)")
    folder = Path(folder)
    skipped = [*sounds.left_out]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "caption"])
    loader: Any = DataLoader(_Conversions(sounds, folder), batch_size=None, num_workers=workers)
    bar = tqdm(loader, "converting", total=len(sounds), unit="sound", disable=not progress)
    written = 0
    for index, done in enumerate(bar):
        if isinstance(done, OSError):
            raise done
        if isinstance(done, UnreadableSoundError):
            reason = str(done).removeprefix(f"{sounds.name(index)}: ")
            skipped.append(Skipped(sounds.name(index), reason))
            continue
        captions = sounds.captions(index)
        one = len(captions) == 1 and not captions[0].startswith("[")
        writer.writerow([done, captions[0] if one else json.dumps(captions, ensure_ascii=False)])
        written += 1
    if not written:
        fail("sounds", f"none of {len(sounds)} that can be read", "at least one")
    with atomic_file(folder / MANIFEST) as file:
        file.write(table.getvalue().encode())
    return skipped
