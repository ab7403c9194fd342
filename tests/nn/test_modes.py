"""Evaluation mode for a while."""

from __future__ import annotations

import pytest
from torch import nn

from musiclm_fast.nn.modes import evaluation_mode


def test_every_submodule_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1].eval()
    model[1][0].train()
    before = [part.training for part in model.modules()]
    with evaluation_mode(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == before
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert [part.training for part in model.modules()] == before
