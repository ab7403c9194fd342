"""Every test here needs upstream, and is skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.upstream import live

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.upstream)
            # upstream stretches a power spectrogram, which does nothing
            ignored = "ignore:The input to TimeStretch must be complex type"
            item.add_marker(pytest.mark.filterwarnings(ignored))


@pytest.fixture(scope="session", autouse=True)
def upstream() -> live.Upstream:
    """Upstream's modules."""
    try:
        return live.load()
    except live.UpstreamMissing as missing:
        pytest.skip(str(missing))
