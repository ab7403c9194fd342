"""Mixing of residual streams: values and every gradient against the float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from musiclm_fast import _extension, testing
from musiclm_fast._dispatch import BackendError
from musiclm_fast.ops import hyper_connection
from musiclm_fast.ops.hyper_connection import hyper_connection_reference

cpp = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())

# batch, streams, dim
SHAPES = [
    ((2, 5), 4, 48), ((7,), 4, 64), ((3, 4), 2, 37), ((5,), 1, 16), ((2,), 7, 33), ((), 3, 20),
    ((1, 1), 4, 1), ((0, 3), 4, 16), ((300,), 4, 32),
]  # fmt: skip


def inputs(
    batch: tuple[int, ...], streams: int, dim: int, branch: bool = True, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return dict(
        streams=normal(*batch, streams, dim),
        beta=normal(*batch, streams) if branch else None,
        branch=normal(*batch, dim) if branch else None,
        weights=normal(dim, streams + 2),
        scales=normal(streams + 2),
        offsets=normal(streams, streams + 2),
    )


def weighed(outputs: tuple[Tensor, ...]) -> Tensor:
    """A sum of all outputs with fixed random weights."""
    generator = torch.Generator().manual_seed(9)
    total = outputs[0].new_zeros(())
    for x in outputs:
        total = total + (x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum()
    return total


def check(arguments: dict[str, Any]) -> None:
    def run(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
        outputs = hyper_connection(**call, backend=backend)
        grads = testing.gradients(weighed(outputs), call, torch.tensor(1.0))
        return {**dict(zip(("input", "mixed", "beta'"), outputs, strict=True)), **grads}

    with testing.poisoned_memory():
        actual = run(arguments, "cpp")
    same = run(arguments, "torch")
    oracle = run(testing.to_float64(arguments), "torch")
    for name, value in actual.items():
        testing.assert_close_to_oracle(name, value, same[name], oracle[name])


@cpp
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("batch", "streams", "dim"), SHAPES)
def test_cpp(batch: tuple[int, ...], streams: int, dim: int, branch: bool, simd_level: str) -> None:
    check(inputs(batch, streams, dim, branch))


@cpp
def test_cpp_on_extreme_and_strided_values() -> None:
    call = inputs((4, 3), 4, 40)
    for factor in (1e-20, 1e10):
        check({**call, "streams": (call["streams"] * factor).detach().requires_grad_()})
    check({**call, "weights": (call["weights"] * 30).detach().requires_grad_()})  # tanh saturates
    one = torch.randn(4, 3, 1, 40).expand(-1, -1, 4, -1)
    check({**call, "streams": one.detach().requires_grad_(), "beta": None, "branch": None})
    turned = torch.randn(40, 4, 3, 4).permute(1, 2, 3, 0)
    check({**call, "streams": turned.detach().requires_grad_()})


@cpp
def test_cpp_zero_streams() -> None:
    """No length to divide by: the mix is the offsets', and the gradient stays finite."""
    call = inputs((3,), 4, 24)
    for name in ("streams", "beta"):
        call[name] = torch.zeros_like(call[name]).requires_grad_()
    outputs = hyper_connection(**call, backend="cpp")
    grads = testing.gradients(weighed(outputs), call, torch.tensor(1.0))
    assert torch.equal(outputs[2], call["offsets"][:, -1].expand(3, -1))
    assert all(g.isfinite().all() for g in grads.values())


@cpp
def test_cpp_is_the_same_on_any_threads() -> None:
    call = inputs((500,), 4, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outputs = hyper_connection(**call, backend="cpp")
            grads = testing.gradients(weighed(outputs), call, torch.tensor(1.0))
            results.append([*outputs, *grads.values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@cpp
def test_cpp_opcheck() -> None:
    call = inputs((6,), 4, 24)
    rows = [call["streams"], call["beta"], call["branch"]]
    parameters = [call["weights"].detach().t().contiguous().requires_grad_()]
    parameters += [call["scales"], call["offsets"]]
    op = torch.ops.musiclm_fast.hyper_connection_forward.default
    torch.library.opcheck(op, (*rows, *parameters))
    torch.library.opcheck(op, (rows[0], None, None, *parameters))


def test_gradients_of_the_definition() -> None:
    call = testing.to_float64(inputs((2, 2), 3, 5))
    leaves = [call[n] for n in ("streams", "beta", "branch", "weights", "scales", "offsets")]
    assert torch.autograd.gradcheck(hyper_connection_reference, leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(streams=torch.zeros(24)), "streams: got"),
        (dict(streams=torch.zeros(6, 4, 24, dtype=torch.int64)), "streams: got"),
        (dict(beta=None), "both or none"),
        (dict(beta=torch.zeros(6, 3)), "beta: got"),
        (dict(branch=torch.zeros(6, 23)), "branch: got"),
        (dict(weights=torch.zeros(24, 5)), "weights: got"),
        (dict(scales=torch.zeros(5)), "scales: got"),
        (dict(offsets=torch.zeros(4, 5)), "offsets: got"),
    ],
)
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        hyper_connection(**{**inputs((6,), 4, 24), **changes})


def test_refusals() -> None:
    with pytest.raises(BackendError, match=r"float32|not built"):
        hyper_connection(**testing.to_float64(inputs((2,), 4, 8)), backend="cpp")
