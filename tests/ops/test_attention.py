"""Attention: the definition, its contract, and the C++ kernel against the float64 definition."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from musiclm_fast import _extension, testing
from musiclm_fast._dispatch import BackendError
from musiclm_fast.ops import attention, grid_codes, grid_offsets
from musiclm_fast.ops.attention import _autograd, attention_reference
from musiclm_fast.ops.attention.reference import dropout_keep, offset_index

# A machine on which the tests for a GPU run may not have it.
pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

cpp = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
INT32 = torch.iinfo(torch.int32)


def results(function: Any, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    out = function(**arguments, **options)
    return {"out": out, **testing.gradients(out, arguments, output_gradient(out))}


def output_gradient(out: Tensor) -> Tensor:
    """(B, H, M, D), stored as (B, M, H, D), as a model's gradients come."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.transpose(1, 2).shape, generator=generator).transpose(1, 2)


def check_against_oracle(
    arguments: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Tensor]:
    """The C++ kernel's output and gradients are as close to float64 as torch's; returns them."""
    with testing.poisoned_memory():
        ours = results(attention, arguments, backend="cpp", **options)
    same = results(attention_reference, arguments, upcast=False, **options)
    oracle = results(attention_reference, testing.to_float64(arguments), **options)
    assert ours.keys() == oracle.keys()
    rounding = testing.attention_rounding(arguments, output_gradient(ours["out"]), **options)
    for name in ours:
        testing.assert_close_to_oracle(
            name, ours[name], same[name], oracle[name],
            dtype=dtype, rounding=rounding.get(name, 0.0),
        )  # fmt: skip
    return ours


CASES: dict[str, dict[str, Any]] = {
    "shared-codes": {},
    "codes-per-sample": {"codes_per_sample": True},
    "no-bias": {"radius": None},
    "no-norm": {"qk_norm": False},
    "plain": {"radius": None, "qk_norm": False},
    "key-mask": {"key_mask": True},
    "key-lengths": {"lengths": True, "batch": 5},
    "mask-and-lengths": {"key_mask": True, "lengths": True, "codes_per_sample": True, "batch": 3},
    "multi-query": {"heads": 4, "kv_heads": 1},
    "grouped-query": {"heads": 6, "kv_heads": 2, "key_mask": True},
    "few-queries": {"queries": 5},
    "one-query": {"queries": 1, "heads": 3, "kv_heads": 1},
    "more-queries-than-keys": {"keys": 23},
    "wide-table": {"radius": 900},
}


# ---- the C++ kernel -----------------------------------------------------------------------------


@cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 372, 744])
def test_cpp_by_length(length: int, dtype: torch.dtype) -> None:
    arguments = testing.attention_inputs(
        batch=1, queries=length, head_dim=64, radius=50, codes_per_sample=True, dtype=dtype
    )
    check_against_oracle(arguments, dtype)


@cpp
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["keep", "drop"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES)
def test_cpp_by_case(case: str, causal: bool, dropout_p: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = testing.attention_inputs(**{"queries": 150, "dtype": dtype, **CASES[case]})
        options = {"dropout_seed": SEED} if dropout_p else {}
        check_against_oracle(arguments, dtype, causal=causal, dropout_p=dropout_p, **options)


@cpp
@pytest.mark.parametrize("head_dim", [1, 7, 16, 20, 32, 48, 80, 96, 128, 144])
def test_cpp_by_head_dim(head_dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        # The norm of one number leaves its sign, whose gradient is rounding and nothing else.
        arguments = testing.attention_inputs(
            queries=70, head_dim=head_dim, qk_norm=head_dim > 1, dtype=dtype
        )
        check_against_oracle(arguments, dtype)


@cpp
def test_cpp_by_simd_level(simd_level: str) -> None:
    assert _extension.simd_level() == simd_level
    for case in ("codes-per-sample", "mask-and-lengths", "grouped-query", "plain"):
        for head_dim, length in ((64, 150), (20, 33)):
            inputs = {"queries": length, "head_dim": head_dim, **CASES[case]}
            arguments = testing.attention_inputs(**inputs)
            check_against_oracle(arguments, causal=True, dropout_p=0.2, dropout_seed=SEED)
            check_against_oracle(arguments)
    half = testing.attention_inputs(queries=40, head_dim=20, dtype=torch.bfloat16)
    check_against_oracle(half, torch.bfloat16)


@cpp
def test_simd_level_from_environment() -> None:
    code = "from musiclm_fast import _extension; print(_extension.simd_level())"
    environment = {**os.environ, "MUSICLM_FAST_SIMD": "baseline"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "baseline"


@cpp
@pytest.mark.parametrize("dropped", [0.0, 0.25], ids=["whole-grid", "patch-dropout"])
@pytest.mark.parametrize("grid", [(16, 62), (5, 7), (40, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_cpp_on_grids(grid: tuple[int, int], dropped: float) -> None:
    height, width = grid
    codes = grid_codes(height, width)
    generator = torch.Generator().manual_seed(3)
    keep = round(len(codes) * (1 - dropped))
    kept = torch.stack([torch.randperm(len(codes), generator=generator)[:keep] for _ in range(2)])
    codes = codes[kept.sort(-1).values]
    arguments = testing.attention_inputs(heads=1, queries=keep, radius=None, head_dim=32)
    columns = len(grid_offsets(height, width))
    arguments["bias_table"] = torch.randn(1, columns, generator=generator).requires_grad_()
    check_against_oracle({**arguments, "q_codes": codes, "k_codes": codes})


@cpp
@pytest.mark.parametrize("scale", [1e4, 1e-4], ids=["one-hot", "uniform"])
def test_cpp_on_extreme_scales(scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = testing.attention_inputs(queries=130, head_dim=64, dtype=dtype)
        check_against_oracle(arguments, dtype, scale=scale)


@cpp
def test_cpp_on_logits_of_a_hundred_thousand() -> None:
    """Rows are one-hot or nearly so, and gradients of q and k what is left of their terms.

    A term is ``scale * p_ij * (<grad_i, v_j> - <grad_i, out_i>) * k_j``, where the difference is
    zero but for rounding of ``sum_d |grad_id v_jd|``.
    """
    arguments = testing.attention_inputs(queries=130, head_dim=64, radius=None, qk_norm=False)
    scale = 1e4
    ours = results(attention, arguments, backend="cpp", scale=scale)
    same = results(attention_reference, arguments, scale=scale)
    wide = testing.to_float64(arguments)
    oracle = results(attention_reference, wide, scale=scale)
    for name in ("out", "v"):
        testing.assert_close_to_oracle(name, ours[name], same[name], oracle[name])
    q, k, v = (wide[name].detach() for name in "qkv")
    weights = (scale * q @ k.mT).softmax(-1)  # (B, H, M, N)
    ds = scale * weights * (output_gradient(ours["out"]).double().abs() @ v.abs().mT)
    for name, size in (("q", ds @ k.abs()), ("k", ds.mT @ q.abs())):
        error = (ours[name] - oracle[name]).abs().max()
        yardstick = (same[name] - oracle[name]).abs().max()
        floor = testing.FLOOR_ULPS * torch.finfo(torch.float32).eps * size.max()
        assert error <= 2 * yardstick + floor, (name, error, yardstick, floor)


@cpp
def test_cpp_on_extreme_biases() -> None:
    arguments = testing.attention_inputs(queries=130, radius=20)
    table = arguments["bias_table"].detach().clone()
    table[:, 5] = 1e4
    table[:, 9] = -torch.finfo(torch.float32).max
    arguments["bias_table"] = table.requires_grad_()
    ours = check_against_oracle(arguments)
    assert all(x.isfinite().all() for x in ours.values())


@cpp
def test_cpp_rows_that_see_no_key() -> None:
    arguments = testing.attention_inputs(batch=3, queries=40, key_mask=True, lengths=True)
    arguments["key_padding_mask"][0] = False
    arguments["key_lengths"] = torch.tensor([40, 0, 31])
    arguments["key_padding_mask"][2] = True
    ours = check_against_oracle(arguments)
    for name in ("out", "q", "k", "v"):
        assert (ours[name][:2] == 0).all()
        assert ours[name][2].abs().sum() > 0
    assert (ours["k"][2, :, 31:] == 0).all()
    assert (ours["v"][2, :, 31:] == 0).all()

    first_rows = testing.attention_inputs(queries=30, keys=12)
    ours = check_against_oracle(first_rows, causal=True)
    assert (ours["out"][:, :, :18] == 0).all()
    assert (ours["q"][:, :, :18] == 0).all()


@cpp
def test_cpp_key_lengths_out_of_range_and_int64() -> None:
    arguments = testing.attention_inputs(batch=3, queries=20)
    arguments["key_lengths"] = torch.tensor([-5, 7, 99])
    check_against_oracle(arguments)


@cpp
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (2, 0, 5, 5)])
def test_cpp_empty(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = sizes
    arguments = testing.attention_inputs(batch, heads, queries, keys, kv_heads=max(heads, 1))
    ours = check_against_oracle(arguments)
    assert all((x == 0).all() for x in ours.values())


@cpp
def test_cpp_strides() -> None:
    arguments = testing.attention_inputs(queries=50, head_dim=32, key_mask=True)
    plain = results(attention, arguments, backend="cpp")

    def spread(x: Tensor) -> Tensor:
        wide = x.detach().new_zeros([2 * size for size in x.shape])
        view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
        view.copy_(x.detach())
        return view.requires_grad_(x.requires_grad)

    strided = {name: spread(value) for name, value in arguments.items()}
    assert not strided["q"].is_contiguous()
    for name, value in results(attention, strided, backend="cpp").items():
        assert torch.equal(value, plain[name]), name

    shared = {**arguments, "k": arguments["k"][:1].expand(2, -1, -1, -1)}
    check_against_oracle(shared)


@cpp
def test_cpp_expanded_gradient() -> None:
    arguments = testing.attention_inputs(queries=20)
    ours = torch.autograd.grad(attention(**arguments, backend="cpp").sum(), arguments["v"])[0]
    torch_path = torch.autograd.grad(attention_reference(**arguments).sum(), arguments["v"])[0]
    torch.testing.assert_close(ours, torch_path)


codes = st.one_of(
    st.integers(-40, 40), st.integers(INT32.min, INT32.max),
    st.sampled_from([INT32.min, INT32.min + 1, -1, 0, 1, INT32.max - 1, INT32.max]),
)  # fmt: skip


@cpp
@settings(max_examples=40, deadline=None)
@given(data=st.data(), radius=st.sampled_from([0, 1, 3, 40, 500]), keys=st.integers(1, 70))
def test_cpp_on_any_codes(data: st.DataObject, radius: int, keys: int) -> None:
    kind = data.draw(st.sampled_from(["any", "sorted", "equal"]))
    queries = data.draw(st.integers(1, 40))

    def draw(length: int) -> Tensor:
        if kind == "equal":
            return torch.full((2, length), data.draw(codes), dtype=torch.int32)
        values = torch.tensor(
            data.draw(st.lists(codes, min_size=2 * length, max_size=2 * length)), dtype=torch.int32
        ).view(2, length)
        return values.sort(-1).values if kind == "sorted" else values

    arguments = testing.attention_inputs(2, 1, queries, keys, 16, radius=radius)
    arguments |= {"q_codes": draw(queries), "k_codes": draw(keys)}
    check_against_oracle(arguments)


@cpp
@pytest.mark.parametrize("keys", range(1, 12))
def test_cpp_table_gradient_that_is_exactly_zero(keys: int) -> None:
    for queries in (1, 3):  # all pairs read one entry: only rounding is left
        check_against_oracle(testing.attention_inputs(2, 1, queries, keys, 16, radius=0))


@cpp
def test_cpp_all_clamped_and_repeated_codes() -> None:
    for shift in (-(2**31), 2**30, 10_000):
        arguments = testing.attention_inputs(queries=200, radius=8)
        arguments["q_codes"] = torch.full((2, 200), shift, dtype=torch.int32)
        arguments["k_codes"] = (torch.arange(200, dtype=torch.int32) // 7).expand(2, 200)
        check_against_oracle(arguments)


@cpp
def test_cpp_dropout_is_the_reference_hash() -> None:
    queries, keys, p = 40, 30, 0.4
    arguments = testing.attention_inputs(2, 3, queries, keys, head_dim=32)
    arguments["v"] = torch.eye(keys, 32).expand(2, 3, keys, 32)  # the output is the weights
    weights = attention(**arguments, backend="cpp", dropout_p=p, dropout_seed=SEED)[..., :keys]
    keep = dropout_keep(SEED, 2, 3, queries, keys, p)
    assert torch.equal(weights != 0, keep)
    dense = attention(**arguments, backend="cpp")[..., :keys]
    torch.testing.assert_close(weights, dense * keep / (1 - p))


@cpp
def test_cpp_is_deterministic_whatever_the_threads() -> None:
    """Many heads (a worker takes a head) and one head (workers share it)."""
    before = torch.get_num_threads()
    try:
        for heads, length in ((6, 300), (1, 700)):
            arguments = testing.attention_inputs(
                1, heads, length, head_dim=64, radius=40, key_mask=True
            )
            found = []
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                found.append(results(attention, arguments, backend="cpp"))
            for other in found[1:]:
                for name, value in other.items():
                    assert torch.equal(value, found[0][name]), (heads, threads, name)
            check_against_oracle(arguments)
    finally:
        torch.set_num_threads(before)


@cpp
def test_cpp_table_too_large_for_one_wave() -> None:
    arguments = testing.attention_inputs(batch=8, heads=2, queries=17, radius=300_000)
    check_against_oracle(arguments)


@cpp
def test_memory_is_linear() -> None:
    """At 6,000 queries and keys one matrix of float32 is 144 MB; the op must not need a third."""
    code = """
import resource, torch
from musiclm_fast import testing
from musiclm_fast.ops import attention
torch.set_num_threads(1)
def peak(length):
    arguments = testing.attention_inputs(1, 1, length, head_dim=16, radius=length)
    attention(**arguments, backend="cpp").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(-peak(100) + peak(6000))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 48, run.stdout


@cpp
@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias_table", "q_scale", "k_scale"])
def test_cpp_gradient_of_one_input(wanted: str) -> None:
    arguments = testing.attention_inputs(queries=20)
    everything = results(attention, arguments, backend="cpp")
    for name, value in arguments.items():
        if name != wanted and value.is_floating_point():
            arguments[name] = value.detach()
    alone = results(attention, arguments, backend="cpp")
    assert alone.keys() == {"out", wanted}
    assert torch.equal(alone[wanted], everything[wanted])


@cpp
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_cpp_takes_parameters_of_other_dtypes(dtype: torch.dtype) -> None:
    arguments = testing.attention_inputs(queries=20)
    for name in ("bias_table", "q_scale", "k_scale"):
        arguments[name] = arguments[name].detach().to(dtype).requires_grad_()
    ours = results(attention, arguments, backend="cpp")
    for name in ("bias_table", "q_scale", "k_scale"):
        assert ours[name].dtype == dtype
    torch_path = results(attention_reference, arguments)
    for name, value in ours.items():
        torch.testing.assert_close(value, torch_path[name], rtol=2e-2, atol=2e-3)


# ---- registration -------------------------------------------------------------------------------


def op_arguments(arguments: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    everything: dict[str, Any] = dict.fromkeys(_autograd.ARGUMENTS)
    everything |= {"scale": 0.2, "causal": False, "dropout_p": 0.0, **arguments, **options}
    return tuple(everything[name] for name in _autograd.ARGUMENTS)


@cpp
@pytest.mark.parametrize("case", ["shared-codes", "plain", "mask-and-lengths", "grouped-query"])
def test_opcheck(case: str) -> None:
    arguments = testing.attention_inputs(**{"queries": 9, **CASES[case]})
    options = {"dropout_p": 0.2, "dropout_seed": SEED}
    forward = torch.ops.musiclm_fast.attention_forward.default
    torch.library.opcheck(forward, op_arguments(arguments, **options))
    detached = {name: value.detach() for name, value in arguments.items()}
    inputs = op_arguments(detached, **options)
    out, logsumexp = forward(*inputs)
    backward = torch.ops.musiclm_fast.attention_backward.default
    torch.library.opcheck(
        backward, (torch.randn_like(out), *inputs[:3], out, logsumexp, *inputs[3:])
    )


@cpp
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compile_with_dynamic_lengths(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=compiler)
    for length in (33, 50, 91):
        arguments = testing.attention_inputs(queries=length, key_mask=True)
        for name, dim in (("q", 2), ("k", 2), ("v", 2), ("q_codes", 0), ("k_codes", 0)):
            torch._dynamo.mark_dynamic(arguments[name], dim)
        torch._dynamo.mark_dynamic(arguments["key_padding_mask"], 1)
        with torch._dynamo.config.patch(error_on_recompile=length > 33):
            ours = results(compiled, arguments, dropout_p=0.1, dropout_seed=SEED)
        eager = results(attention, arguments, dropout_p=0.1, dropout_seed=SEED)
        for name, value in ours.items():
            assert torch.equal(value, eager[name]), name


@cpp
def test_autocast() -> None:
    linear = torch.nn.Linear(32, 96)
    x = torch.randn(2, 20, 32)
    table = torch.randn(2, 9, requires_grad=True)
    code = torch.arange(20, dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = linear(x).view(2, 20, 3, 2, 16).permute(2, 0, 3, 1, 4)
        assert q.dtype == torch.bfloat16
        named = {"bias_table": table, "q_codes": code, "k_codes": code}
        out = attention(q, k, v, **named, backend="cpp")
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert table.grad is not None
    assert table.grad.dtype == torch.float32
    assert linear.weight.grad is not None
    assert linear.weight.grad.isfinite().all()


@cpp
def test_checkpoint_replays_dropout() -> None:
    arguments = testing.attention_inputs(queries=40)

    def layer(q: Tensor, **seed: Tensor) -> Tensor:
        return attention(**{**arguments, "q": q}, dropout_p=0.5, backend="cpp", **seed)

    for seed in ({"dropout_seed": SEED}, {}):  # given, and drawn from the default generator
        torch.manual_seed(5)
        plain = torch.autograd.grad(layer(arguments["q"], **seed).square().sum(), arguments["q"])
        torch.manual_seed(5)
        out = checkpoint(layer, arguments["q"], use_reentrant=False, **seed)
        again = torch.autograd.grad(out.square().sum(), arguments["q"])
        assert torch.equal(plain[0], again[0])


@cpp
def test_no_grad_and_inference_mode() -> None:
    arguments = testing.attention_inputs(queries=20)
    expected = attention(**arguments, backend="cpp").detach()
    with torch.no_grad():
        assert torch.equal(attention(**arguments, backend="cpp"), expected)
    with torch.inference_mode():
        assert torch.equal(attention(**arguments, backend="cpp"), expected)


@cpp
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_take_the_torch_backend(dtype: torch.dtype) -> None:
    arguments = testing.attention_inputs(queries=12, dtype=dtype)
    assert torch.equal(attention(**arguments), attention_reference(**arguments))
    with pytest.raises(BackendError, match="float32 and bfloat16"):
        attention(**arguments, backend="cpp")


# ---- the definition -----------------------------------------------------------------------------


def test_definition_by_loops() -> None:
    """Every similarity written out, for two of everything."""
    arguments = testing.attention_inputs(2, 2, 3, 4, 8, kv_heads=1, radius=2, key_mask=True)
    arguments = {name: value.detach() for name, value in testing.to_float64(arguments).items()}
    out = attention(**arguments, causal=True, scale=0.7)
    q, k = (torch.nn.functional.normalize(arguments[n], dim=-1) for n in ("q", "k"))
    q, k = q * arguments["q_scale"], k * arguments["k_scale"]
    for b in range(2):
        for h in range(2):
            for i in range(3):
                seen = [j for j in range(4) if j <= i + 1 and arguments["key_padding_mask"][b, j]]
                logits = []
                for j in seen:
                    offset = int(arguments["q_codes"][i]) - int(arguments["k_codes"][j])
                    bias = arguments["bias_table"][h, 2 + max(-2, min(2, offset))]
                    logits.append(0.7 * (q[b, h, i] @ k[b, 0, j]) + bias)
                expected = torch.zeros(8, dtype=torch.float64)
                if seen:
                    weights = torch.stack(logits).softmax(0)
                    expected = weights @ arguments["v"][b, 0, seen]
                torch.testing.assert_close(out[b, h, i], expected)


def test_definition_gradients() -> None:
    arguments = testing.attention_inputs(1, 2, 3, 4, 4, radius=3, dtype=torch.float64)
    names = [n for n, v in arguments.items() if v.requires_grad]

    def function(*values: Tensor) -> Tensor:
        given = {**arguments, **dict(zip(names, values, strict=True))}
        return attention(**given, causal=True, dropout_p=0.3, dropout_seed=SEED)

    assert torch.autograd.gradcheck(function, tuple(arguments[n] for n in names))


def test_offset_index_does_not_wrap() -> None:
    codes = torch.tensor([INT32.min, 0, INT32.max], dtype=torch.int32)
    assert offset_index(codes, codes, 3).tolist() == [[3, 0, 0], [6, 3, 0], [6, 6, 3]]


def test_grid_codes_and_offsets() -> None:
    height, width = 3, 4
    codes = grid_codes(height, width).long()
    offsets = grid_offsets(height, width)
    radius = len(offsets) // 2
    place = torch.stack((torch.arange(12) // width, torch.arange(12) % width), dim=-1)
    index = codes[:, None] - codes[None, :] + radius
    assert torch.equal(offsets[index], place[:, None] - place[None, :])
    assert index.min() > 0  # the edge entries are nobody's
    assert index.max() < 2 * radius


def test_dropout_rate_and_scale() -> None:
    keep = dropout_keep(SEED, 2, 4, 64, 64, 0.25)
    assert abs(keep.float().mean().item() - 0.75) < 0.01
    other = dropout_keep(SEED + 1, 2, 4, 64, 64, 0.25)
    assert (keep != other).float().mean() > 0.3


def test_dropout_seed_comes_from_the_generator() -> None:
    arguments = testing.attention_inputs(queries=20)
    torch.manual_seed(1)
    first = attention(**arguments, dropout_p=0.5)
    second = attention(**arguments, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(attention(**arguments, dropout_p=0.5), first)
    assert not torch.equal(first, second)


# ---- bad input ----------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q-ndim": ({"q": torch.zeros(2, 17, 32)}, ValueError, r"q: .*shape \(B, H, M, D\)"),
    "q-dtype": ({"q": torch.zeros(2, 2, 17, 32).int()}, TypeError, "q: .*dtype float32"),
    "q-type": ({"q": [1.0]}, TypeError, r"q: .*torch\.Tensor"),
    "k-dtype": ({"k": torch.zeros(2, 2, 17, 32).double()}, TypeError, "k: .*dtype float32"),
    "k-batch": ({"k": torch.zeros(3, 2, 17, 32)}, ValueError, "k: .*shape"),
    "k-heads": ({"k": torch.zeros(2, 3, 17, 32)}, ValueError, "k: .*divides q's 2 heads"),
    "v-length": ({"v": torch.zeros(2, 2, 16, 32)}, ValueError, "v: .*shape"),
    "even-table": ({"bias_table": torch.zeros(2, 16)}, ValueError, "bias_table: .*odd"),
    "table-heads": ({"bias_table": torch.zeros(3, 17)}, ValueError, "bias_table: .*shape"),
    "table-alone": ({"q_codes": None}, ValueError, "all three or none"),
    "code-dtype": ({"q_codes": torch.zeros(17).long()}, TypeError, "q_codes: .*int32"),
    "code-length": ({"k_codes": torch.zeros(9).int()}, ValueError, "k_codes: .*shape"),
    "code-ndim": ({"k_codes": torch.zeros(2, 17).int()}, ValueError, "k_codes: .*dimensions"),
    "mask-dtype": ({"key_padding_mask": torch.ones(2, 17)}, TypeError, "key_padding_mask: .*bool"),
    "mask-shape": ({"key_padding_mask": torch.ones(2, 9).bool()}, ValueError, "key_padding_mask"),
    "lengths-dtype": ({"key_lengths": torch.ones(2)}, TypeError, "key_lengths: .*int32"),
    "scale-alone": ({"k_scale": None}, ValueError, "q_scale, k_scale: .*both or none"),
    "scale-shape": ({"q_scale": torch.ones(9)}, ValueError, "q_scale: .*shape"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p: .*probability"),
    "seed-dtype": ({"dropout_seed": torch.zeros(1)}, TypeError, "dropout_seed: .*int64"),
    "seed-size": ({"dropout_seed": torch.zeros(2).long()}, ValueError, "dropout_seed: .*one"),
    "device": ({"v": torch.zeros(2, 2, 17, 32, device="meta")}, ValueError, "v: .*device"),
    "backend": ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, error, message = BAD[name]
    arguments = {**testing.attention_inputs(), **changed}
    with pytest.raises(error, match=message):
        attention(**arguments)


def test_the_backward_makes_no_zeros_that_nobody_reads() -> None:
    """As autograd does for the statistics' gradient, by default: a launch on a GPU."""
    out = attention(**testing.attention_inputs(queries=9, batch=2, heads=1), backend="cpp")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "musiclm_fast::attention_backward" in names
    assert not names & {"aten::zeros", "aten::zero_"}
