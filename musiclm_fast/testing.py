"""Tools for parity tests and benchmarks: the tolerance rule, poisoned memory, inputs of the ops.

:mod:`musiclm_fast._oracle` explains the rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from musiclm_fast._oracle import FLOOR_ULPS, assert_close_to_oracle, gradients, to_float64
from musiclm_fast.ops.attention._parity import attention_inputs, attention_rounding
from musiclm_fast.ops.contrastive._parity import (
    contrastive_inputs,
    contrastive_labels,
    contrastive_rounding,
)
from musiclm_fast.ops.geglu_norm._parity import geglu_norm_inputs
from musiclm_fast.ops.hyper_connection._parity import hyper_connection_inputs

__all__ = [
    "FLOOR_ULPS",
    "assert_close_to_oracle",
    "attention_inputs",
    "attention_rounding",
    "contrastive_inputs",
    "contrastive_labels",
    "contrastive_rounding",
    "geglu_norm_inputs",
    "gradients",
    "hyper_connection_inputs",
    "poisoned_memory",
    "to_float64",
]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new uninitialised tensor with NaN (integers with their maximum).

    An output that a kernel does not write then shows. Only as a warning does torch then say what
    it cannot do deterministically: on CUDA that would be every product of matrices.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill
