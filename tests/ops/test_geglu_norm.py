"""The gated unit with its norm: values and every gradient against the float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from musiclm_fast import _extension, testing
from musiclm_fast._dispatch import BackendError
from musiclm_fast.ops import geglu_norm
from musiclm_fast.ops.geglu_norm import geglu_norm_reference

cpp = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())


def inputs(batch: tuple[int, ...], hidden: int, padded: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return dict(x=normal(*batch, 2 * padded), gamma=normal(hidden), beta=normal(hidden))


def check(arguments: dict[str, Any]) -> None:
    def run(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
        out = geglu_norm(**call, backend=backend)
        generator = torch.Generator().manual_seed(9)
        grad = torch.randn(out.shape, generator=generator).to(out.dtype)
        return {"out": out, **testing.gradients(out, call, grad)}

    with testing.poisoned_memory():
        actual = run(arguments, "cpp")
    same = run(arguments, "torch")
    oracle = run(testing.to_float64(arguments), "torch")
    for name, value in actual.items():
        testing.assert_close_to_oracle(name, value, same[name], oracle[name])


@cpp
@pytest.mark.parametrize(
    ("batch", "hidden", "padded"),
    [((2, 5), 48, 48), ((7,), 85, 96), ((3,), 17, 33), ((130,), 32, 32), ((), 20, 20), ((0,), 8, 8),
     ((4,), 2, 16)],
)  # fmt: skip
def test_cpp(batch: tuple[int, ...], hidden: int, padded: int, simd_level: str) -> None:
    check(inputs(batch, hidden, padded))


@cpp
def test_cpp_on_extreme_and_strided_values() -> None:
    call = inputs((6,), 40, 48)
    for factor in (1e-3, 30.0):
        check({**call, "x": (call["x"] * factor).detach().requires_grad_()})
    turned = torch.randn(96, 2, 3).permute(1, 2, 0)
    check({**call, "x": turned.detach().requires_grad_()})


@cpp
def test_cpp_padding_is_neither_read_nor_left() -> None:
    call = inputs((3,), 10, 16)
    clean = geglu_norm(**call, backend="cpp")
    with torch.no_grad():
        call["x"].view(3, 2, 16)[..., 10:] = torch.nan
    out = geglu_norm(**call, backend="cpp")
    assert torch.equal(out, clean)
    assert (out[:, 10:] == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), [call["x"]])
    assert (grad.view(3, 2, 16)[..., 10:] == 0).all()


@cpp
def test_cpp_opcheck() -> None:
    call = inputs((6,), 20, 24)
    op = torch.ops.musiclm_fast.geglu_norm_forward.default
    torch.library.opcheck(op, tuple(call.values()))


def test_gradients_of_the_definition() -> None:
    call = testing.to_float64(inputs((2, 2), 5, 7))
    assert torch.autograd.gradcheck(geglu_norm_reference, list(call.values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(3, 31)), "x: got"),
        (dict(x=torch.zeros(3, 18)), "x: got"),
        (dict(x=torch.zeros(3, 32, dtype=torch.int64)), "x: got"),
        (dict(gamma=torch.zeros(1, 10)), "gamma: got"),
        (dict(beta=torch.zeros(9)), "beta: got"),
    ],
)
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        geglu_norm(**{**inputs((3,), 10, 16), **changes})


def test_refusals() -> None:
    with pytest.raises(BackendError, match=r"float32|not built"):
        geglu_norm(**testing.to_float64(inputs((2,), 8, 8)), backend="cpp")
