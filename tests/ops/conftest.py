"""What the tests of several ops share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from musiclm_fast import _extension


@pytest.fixture(params=_extension.SIMD_LEVELS)
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test at every SIMD level that this processor has."""
    before = _extension.simd_level()
    try:
        _extension.set_simd_level(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _extension.set_simd_level(before)


def ordered_product(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``total + a @ b`` of (M, K) and (K, N), in total's dtype, adding in order of k.

    The same bits on every machine, and ``a @ b`` is the transpose of ``b.T @ a.T`` bit by bit, as
    on a GPU's tensor cores; neither holds for a BLAS.
    """
    a, b = a.astype(total.dtype), b.astype(total.dtype)
    acc, term = np.zeros_like(total), np.empty_like(total)
    for k in range(a.shape[-1]):
        acc += np.multiply(a[..., :, k, None], b[..., k, None, :], out=term)
    return acc + total


def _create_dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(ordered_product(a.data, b.data, d.data), d.dtype.scalar)


@pytest.fixture(scope="module")
def interpreted_products() -> Iterator[None]:
    """Triton's interpreter multiplies by :func:`ordered_product`, not by numpy's BLAS."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
        yield
