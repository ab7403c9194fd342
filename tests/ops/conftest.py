"""What the tests of several ops share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from musiclm_fast import _extension
from musiclm_fast.ops import _triton_target


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


@pytest.fixture
def gpu() -> str:
    """The device of a test that needs a GPU: for graphs, for memory, for compiled kernels."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's kernels run: Triton on a GPU, or on the CPU interpreted; others on the CPU."""
    of_test = getattr(request.node, "callspec", None)
    backend = of_test.params.get("backend") if of_test else None
    if _triton_target.INTERPRET or backend in ("cpp", "torch"):
        return "cpu"
    return str(request.getfixturevalue("gpu"))


def ordered_product(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``total + a @ b`` of (M, K) and (K, N), in total's dtype, adding in order of k.

    The same bits on every machine, and ``a @ b`` is the transpose of ``b.T @ a.T`` bit by bit, as
    on a GPU's tensor cores; neither holds for a BLAS.
    """
    a, b = a.astype(total.dtype), b.astype(total.dtype)
    acc, term = np.zeros_like(total), np.empty_like(total)
    with np.errstate(invalid="ignore", over="ignore"):  # of padding, whose sums nobody reads
        for k in range(a.shape[-1]):
            acc += np.multiply(a[..., :, k, None], b[..., k, None, :], out=term)
    return acc + total


def wide(x: Any) -> np.ndarray:
    """A handle's values in numpy's terms: the interpreter keeps bfloat16 as its 16 bits."""
    if x.dtype.scalar.is_bf16():
        bits: np.ndarray = x.data.astype(np.uint32) << 16
        return bits.view(np.float32)
    return np.asarray(x.data)


def _create_dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(ordered_product(wide(a), wide(b), d.data), d.dtype.scalar)


@pytest.fixture(scope="module", autouse=True)
def interpreted_arithmetic() -> Iterator[None]:
    """Triton's interpreter computes as a GPU does, where it does not by itself.

    Products are :func:`ordered_product`, not numpy's BLAS, which would multiply bfloat16's bits as
    integers; float32 is rounded to the nearest bfloat16, not towards zero.
    """
    if not _triton_target.INTERPRET:
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(builder: Any, x: Any, to: Any) -> Any:
        if to.scalar.is_bf16() and x.dtype.scalar.is_fp32():
            values = torch.from_numpy(np.array(x.data, order="C")).bfloat16()
            data = values.view(torch.int16).numpy().view(np.uint16)
        elif to.scalar.is_fp32() and x.dtype.scalar.is_bf16():
            data = wide(x)
        else:
            return cast(builder, x, to)
        return interpreter.TensorHandle(data, to.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _create_dot)
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(_triton_target, "INTERPRETED_DTYPES", _triton_target.DTYPES)
        yield
