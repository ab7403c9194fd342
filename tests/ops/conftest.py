"""What the tests of several ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from musiclm_fast import _extension


@pytest.fixture(params=_extension.SIMD_LEVELS)
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test at every SIMD level that this processor has."""
    from musiclm_fast import _C

    before = _C.simd_level()
    try:
        _C.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _C.set_simd_level(before)
