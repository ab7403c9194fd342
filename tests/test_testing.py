"""The tools of parity tests."""

from __future__ import annotations

import torch

from musiclm_fast import testing


def test_poisoned_memory_shows_what_is_not_written_and_forbids_nothing() -> None:
    with testing.poisoned_memory():
        assert torch.empty(3).isnan().all()
        # As an error, torch would refuse every product of matrices on CUDA.
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
