"""Fixtures of the live comparison."""

from __future__ import annotations

import pytest

from tests.reference import live


@pytest.fixture(scope="session")
def reference() -> live.Reference:
    """The live reference's modules; skips where they are not installed."""
    try:
        return live.load()
    except live.ReferenceMissing as missing:
        pytest.skip(str(missing))
