"""Mixing of residual streams: values and every gradient against the float64 definition.

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
from musiclm_fast.ops import _triton_target, hyper_connection
from musiclm_fast.ops.hyper_connection import _triton, hyper_connection_reference
from musiclm_fast.testing import hyper_connection_inputs as inputs

cpp = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())
triton = pytest.param("triton", marks=pytest.mark.gpu)
KERNELS = [triton] if _triton_target.INTERPRET else [pytest.param("cpp", marks=cpp), triton]

# batch, streams, dim
SHAPES = [
    ((2, 5), 4, 48), ((7,), 4, 64), ((3, 4), 2, 37), ((5,), 1, 16), ((2,), 7, 33), ((), 3, 20),
    ((1, 1), 4, 1), ((0, 3), 4, 16), ((2,), 4, 512), ((1,), 5, 768),
]  # fmt: skip


def weighed(outputs: tuple[Tensor, ...]) -> Tensor:
    """A sum of all outputs with fixed random weights."""
    generator = torch.Generator().manual_seed(9)
    total = outputs[0].new_zeros((), dtype=torch.float64)
    for x in outputs:
        weights = torch.randn(x.shape, generator=generator).to(x)
        total = total + (x.double() * weights.double()).sum()
    return total


def results(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The outputs and every gradient."""
    outputs = hyper_connection(**call, backend=backend)
    one = torch.ones((), device=outputs[0].device)
    grads = testing.gradients(weighed(outputs), call, one)
    return {**dict(zip(("input", "mixed", "beta'"), outputs, strict=True)), **grads}


def check(call: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """By the rule; arguments of other dtypes than the streams', for torch in the streams'. A result
    is known to the coarser of its own dtype and the streams'."""
    with testing.poisoned_memory():
        actual = results(call, backend)
    like = call["streams"].dtype
    alike = {n: v if v is None else v.detach().to(like).requires_grad_() for n, v in call.items()}
    same = results(alike, "torch")
    oracle = results(testing.to_float64(call), "torch")
    for name, value in actual.items():
        assert value.dtype == (call[name].dtype if name in call else like), name
        coarser = max(value.dtype, like, key=lambda dtype: torch.finfo(dtype).eps)
        testing.assert_close_to_oracle(name, value, same[name], oracle[name], dtype=coarser)
    return actual


@cpp
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("batch", "streams", "dim"), [*SHAPES, ((300,), 4, 32)])
def test_cpp(batch: tuple[int, ...], streams: int, dim: int, branch: bool, simd_level: str) -> None:
    check(inputs(batch, streams, dim, branch), "cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", _triton_target.DTYPES, ids=str)
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("batch", "streams", "dim"), SHAPES)
def test_triton(
    batch: tuple[int, ...], streams: int, dim: int, branch: bool, dtype: torch.dtype, device: str
) -> None:
    check(inputs(batch, streams, dim, branch, dtype=dtype, device=device), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", [("streams", "beta", "branch"), ("branch",)], ids="-".join)
def test_triton_takes_mixed_dtypes(low: tuple[str, ...], dtype: torch.dtype, device: str) -> None:
    """As autocast leaves them: it does not reach the op, whose outputs have the streams' dtype."""
    call = inputs((5,), 4, 24, device=device)
    call |= {name: call[name].detach().to(dtype).requires_grad_() for name in low}
    outside = check(call, "triton")
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = results(call, "triton")
    assert all(torch.equal(inside[name], value) for name, value in outside.items())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 7, 23])
def test_triton_programs_take_several_tokens(
    tokens: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last span is shorter; sums over spans are the same bits each time."""
    monkeypatch.setattr(_triton, "PROGRAMS", 3)
    first, second = (check(inputs((tokens,), 4, 20, device=device), "triton") for _ in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [4, 8])
def test_triton_largest_sizes(streams: int, device: str) -> None:
    dim = _triton.widest(streams)
    check(inputs((2,), streams, dim, device=device), "triton")
    with pytest.raises(BackendError, match=f"{dim + 1} numbers a row, not 1 to {dim}"):
        hyper_connection(**inputs((2,), streams, dim + 1, device=device), backend="triton")
    with pytest.raises(BackendError, match="9 streams, not 1 to 8"):
        hyper_connection(**inputs((2,), 9, 16, device=device), backend="triton")


@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_and_strided_values(backend: str, device: str) -> None:
    call = inputs((4, 3), 4, 40, device=device)
    for factor in (1e-20, 1e10):
        check({**call, "streams": (call["streams"] * factor).detach().requires_grad_()}, backend)
    saturated = (call["weights"] * 30).detach().requires_grad_()  # the tanh
    check({**call, "weights": saturated}, backend)
    one = torch.randn(4, 3, 1, 40, device=device).expand(-1, -1, 4, -1)
    streams = one.detach().requires_grad_()
    check({**call, "streams": streams, "beta": None, "branch": None}, backend)
    turned = torch.randn(40, 4, 3, 4, device=device).permute(1, 2, 3, 0)
    check({**call, "streams": turned.detach().requires_grad_()}, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_zero_streams(backend: str, device: str) -> None:
    """No length to divide by: the mix is the offsets', and the gradient stays finite."""
    call = inputs((3,), 4, 24, device=device)
    for name in ("streams", "beta"):
        call[name] = torch.zeros_like(call[name]).requires_grad_()
    found = results(call, backend)
    assert torch.equal(found["beta'"], call["offsets"][:, -1].expand(3, -1))
    assert all(value.isfinite().all() for value in found.values())


@cpp
def test_cpp_is_the_same_on_any_threads() -> None:
    call = inputs((500,), 4, 64)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(call, "cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend: str, device: str) -> None:
    call = inputs((6,), 4, 24, device=device)
    rows = [call["streams"], call["beta"], call["branch"]]
    parameters = [call["weights"].detach().t().contiguous().requires_grad_()]
    parameters += [call["scales"], call["offsets"]]
    name = f"hyper_connection_forward{'_triton' if backend == 'triton' else ''}"
    op = getattr(torch.ops.musiclm_fast, name).default
    torch.library.opcheck(op, (*rows, *parameters))
    torch.library.opcheck(op, (rows[0], None, None, *parameters))


@pytest.mark.parametrize("backend", KERNELS)
def test_compiles_whole(backend: str, device: str) -> None:
    def loss(*arguments: Tensor) -> Tensor:
        outputs = hyper_connection(*arguments, backend=backend)
        return torch.stack([x.square().sum() for x in outputs]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        leaves = list(inputs((tokens,), 4, 24, device=device).values())
        ours, eager = compiled(*leaves), loss(*leaves)
        assert torch.equal(ours, eager)
        found, expected = (torch.autograd.grad(x, leaves) for x in (ours, eager))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(_triton_target.INTERPRET, reason="needs a CUDA device: its graphs")
def test_triton_in_a_cuda_graph(gpu: str) -> None:
    call = inputs((700,), 4, 512, dtype=torch.bfloat16, device=gpu)
    grads = [torch.randn_like(call[name]) for name in ("branch", "streams", "beta")]

    def step() -> list[Tensor]:
        outputs = hyper_connection(**call, backend="triton")
        return [*outputs, *torch.autograd.grad(outputs, list(call.values()), grads)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call["streams"].copy_(torch.randn_like(call["streams"]))
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
        changed = {"kept": arguments["kept"] * 1.1} if "dx" in arguments else {}
        launch(kernel, programs, arguments | changed, options)

    monkeypatch.setattr(_triton_target, "launch", spoiled)
    problem = _triton.self_check(torch.device(device), dtype)
    assert problem is not None and "error" in problem


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
    call = inputs((2,), 4, 8)
    if not _triton_target.INTERPRET:
        with pytest.raises(BackendError, match=r"CUDA|not installed"):
            hyper_connection(**call, backend="triton")
    ok, reason = _triton.supports(**call | {"scales": torch.zeros(6, dtype=torch.float64)})
    assert not ok and ("CUDA" in reason or "scales is torch.float64" in reason)
