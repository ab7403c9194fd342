"""The gated unit with its norm: values and every gradient against the float64 definition.

The Triton kernels' tests are marked ``gpu``: they run on a GPU, or in Triton's interpreter, with
which test_interpreted.py runs this file anew: TRITON_INTERPRET=1 is read at import.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from musiclm_fast import _extension, testing
from musiclm_fast._dispatch import BackendError
from musiclm_fast.ops import _triton_target, geglu_norm
from musiclm_fast.ops.geglu_norm import _triton, geglu_norm_reference
from musiclm_fast.testing import geglu_norm_inputs as inputs

cpp = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())
triton = pytest.param("triton", marks=pytest.mark.gpu)
KERNELS = [triton] if _triton_target.INTERPRET else [pytest.param("cpp", marks=cpp), triton]


def results(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The output and every gradient."""
    out = geglu_norm(**call, backend=backend)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(out.shape, generator=generator).to(out)
    return {"out": out, **testing.gradients(out, call, grad)}


def check(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """By the rule; parameters of other dtypes than x's, which torch refuses on CUDA, in x's."""
    with testing.poisoned_memory():
        actual = results(call, backend)
    like = call["x"].dtype
    same = results({n: v.detach().to(like).requires_grad_() for n, v in call.items()}, "torch")
    oracle = results(testing.to_float64(call), "torch")
    assert actual["out"].dtype == like
    for name, value in actual.items():
        assert name == "out" or value.dtype == call[name].dtype
        testing.assert_close_to_oracle(name, value, same[name], oracle[name], dtype=like)
    return actual


SHAPES = [  # batch, hidden, padded
    ((2, 5), 48, 48), ((7,), 85, 96), ((3,), 17, 33), ((130,), 32, 32), ((), 20, 20), ((0,), 8, 8),
    ((4,), 2, 16), ((3,), 1365, 1376), ((2,), 1365, 1365),
]  # fmt: skip


@cpp
@pytest.mark.parametrize(("batch", "hidden", "padded"), SHAPES)
def test_cpp(batch: tuple[int, ...], hidden: int, padded: int, simd_level: str) -> None:
    check(inputs(batch, hidden, padded), "cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", _triton_target.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "hidden", "padded"), SHAPES)
def test_triton(
    batch: tuple[int, ...], hidden: int, padded: int, dtype: torch.dtype, device: str
) -> None:
    check(inputs(batch, hidden, padded, dtype=dtype, device=device), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_takes_parameters_in_float32(dtype: torch.dtype, device: str) -> None:
    """As autocast leaves them: it does not reach the op, whose output has x's dtype."""
    call = inputs((5,), 40, 48, device=device)
    call["x"] = call["x"].detach().to(dtype).requires_grad_()
    outside = check(call, "triton")
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = results(call, "triton")
    assert all(torch.equal(inside[name], value) for name, value in outside.items())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 23])
def test_triton_programs_take_several_rows(
    rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last span is shorter; sums over spans are the same bits each time."""
    monkeypatch.setattr(_triton, "FORWARD_PROGRAMS", 3)
    monkeypatch.setattr(_triton, "BACKWARD_PROGRAMS", 3)
    first, second = (check(inputs((rows,), 21, 24, device=device), "triton") for _ in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.gpu
def test_triton_widest_row(device: str) -> None:
    hidden = _triton.MAX_WIDTH // 2
    check(inputs((2,), hidden - 1, hidden, device=device), "triton")
    wider = inputs((2,), hidden, hidden + 1, device=device)
    with pytest.raises(BackendError, match=f"numbers a row, not 1 to {2 * hidden}"):
        geglu_norm(**wider, backend="triton")


@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_and_strided_values(backend: str, device: str) -> None:
    call = inputs((6,), 40, 48, device=device)
    for factor in (1e-3, 30.0, 1e4):
        check({**call, "x": (call["x"] * factor).detach().requires_grad_()}, backend)
    turned = torch.randn(96, 2, 3, device=device).permute(1, 2, 0)
    check({**call, "x": turned.detach().requires_grad_()}, backend)
    check({**call, "x": torch.zeros_like(call["x"]).requires_grad_()}, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_padding_is_neither_read_nor_left(backend: str, device: str) -> None:
    call = inputs((3,), 10, 16, device=device)
    clean = geglu_norm(**call, backend=backend)
    with torch.no_grad():
        call["x"].view(3, 2, 16)[..., 10:] = torch.nan
    out = geglu_norm(**call, backend=backend)
    assert torch.equal(out, clean)
    assert (out[:, 10:] == 0).all()
    weights = torch.ones_like(out)
    weights[:, 10:] = torch.nan
    grads = torch.autograd.grad(out, list(call.values()), weights)
    assert (grads[0].view(3, 2, 16)[..., 10:] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str, device: str) -> None:
    call = inputs((6,), 20, 24, device=device)
    name = f"geglu_norm_forward{'_triton' if backend == 'triton' else ''}"
    torch.library.opcheck(getattr(torch.ops.musiclm_fast, name).default, tuple(call.values()))


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_whole(backend: str, device: str) -> None:
    def loss(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return geglu_norm(x, gamma, beta, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        call = inputs((rows,), 20, 24, device=device)
        ours, eager = compiled(**call), loss(**call)
        assert torch.equal(ours, eager)
        found, expected = (torch.autograd.grad(x, list(call.values())) for x in (ours, eager))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(_triton_target.INTERPRET, reason="needs a CUDA device: its graphs")
def test_triton_in_a_cuda_graph(gpu: str) -> None:
    call = inputs((700,), 1365, 1376, dtype=torch.bfloat16, device=gpu)
    grad = torch.randn(700, 1376, device=gpu, dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        out = geglu_norm(**call, backend="triton")
        return [out, *torch.autograd.grad(out, list(call.values()), grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call["x"].copy_(torch.randn_like(call["x"]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", _triton_target.DTYPES, ids=str)
def test_triton_self_check(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _triton.self_check(torch.device(device), dtype) is None
    launch = _triton_target.launch

    def spoiled(kernel: Any, programs: int, arguments: Any, options: Any) -> None:
        changed = {"x": arguments["x"] * 1.1} if "dx" in arguments else {}
        launch(kernel, programs, arguments | changed, options)

    monkeypatch.setattr(_triton_target, "launch", spoiled)
    problem = _triton.self_check(torch.device(device), dtype)
    assert problem is not None and "error" in problem


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
    if not _triton_target.INTERPRET:
        with pytest.raises(BackendError, match=r"CUDA|not installed"):
            geglu_norm(**inputs((2,), 8, 8), backend="triton")
    call = inputs((2,), 8, 8) | {"gamma": torch.zeros(8, dtype=torch.float64)}
    ok, reason = _triton.supports(**call)
    assert not ok and ("CUDA" in reason or "gamma is torch.float64" in reason)
    call |= {"gamma": torch.zeros(0), "beta": torch.zeros(0)}
    assert _triton.supports(**call) == (False, "there is no hidden unit")
