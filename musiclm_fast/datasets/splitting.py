"""Split a dataset into training and validation."""

from __future__ import annotations

import hashlib

import numpy as np

from musiclm_fast._checks import check_probability
from musiclm_fast.datasets.captioned_sounds import CaptionedSounds


def split(
    dataset: CaptionedSounds, valid_frac: float, seed: int = 0
) -> tuple[CaptionedSounds, CaptionedSounds]:
    """Split into a part for training and one for validation.

    A file's split is a function of its name and the seed: adding files moves no other file, and all
    parts of one file stay in the same split. With few files a split may be empty.

    Args:
        dataset: the dataset.
        valid_frac: share of the files for validation, in [0, 1); met on average.
        seed: of the split.

    Returns:
        ``(train, valid)``.
    """
    check_probability("valid_frac", valid_frac)
    key = str(seed).encode()
    bound = int(valid_frac * 2**64)
    is_valid = np.zeros(len(dataset), dtype=bool)
    for index in range(len(dataset)):
        name = dataset.file(index).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(name, digest_size=8, key=key).digest()
        is_valid[index] = int.from_bytes(digest, "big") < bound
    return dataset.select(np.flatnonzero(~is_valid)), dataset.select(np.flatnonzero(is_valid))
