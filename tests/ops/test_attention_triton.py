"""The attention op's Triton kernels: the same tests in Triton's interpreter and on a GPU.

Tests marked ``gpu`` run on a GPU, by ``make test-gpu``, or else in the interpreter. That must be
asked for before Triton is imported, so they run in a second pytest process over this file, started
by ``test_parity_in_the_interpreter``; one by one: ``TRITON_INTERPRET=1 pytest -m gpu FILE``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from musiclm_fast import testing
from musiclm_fast.ops import _triton_target, attention, grid_codes
from musiclm_fast.ops.attention import (
    _autograd,
    _triton,
    _triton_backward,
    _triton_plan,
    _triton_table,
    attention_reference,
)
from musiclm_fast.ops.attention.reference import offset_bias

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreted(test: Any) -> Any:
    """Collected only in the process that interprets the kernels."""
    test.__test__ = INTERPRETED
    return test


def compiled(test: Any) -> Any:
    """Collected only where kernels are compiled."""
    test.__test__ = not INTERPRETED
    return test


SEED = 2**40 + 77  # both halves of the seed are in use
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "n1": (dict(queries=1, qk_norm=False), {}),
    "n17-per_sample-mask-lengths": (
        dict(queries=17, codes_per_sample=True, key_mask=True, lengths=True, batch=3),
        {},
    ),
    "n63-causal-multi_query": (dict(queries=63, heads=3, kv_heads=1, batch=1), dict(causal=True)),
    "n64-grouped-dropout": (
        dict(queries=64, heads=4, kv_heads=2, batch=1),
        dict(dropout_p=0.3, dropout_seed=SEED),
    ),
    "n65-per_sample-dropout-mask": (
        dict(queries=65, heads=1, codes_per_sample=True, key_mask=True),
        dict(dropout_p=0.1, dropout_seed=SEED),
    ),
    "n130-lengths": (
        dict(queries=130, heads=1, batch=1, codes_per_sample=True, lengths=True, seed=1),
        {},
    ),
    "n130-causal-no_norm": (
        dict(queries=130, heads=1, batch=1, qk_norm=False, radius=70),
        dict(causal=True),
    ),
    "m1-n65-cached": (dict(queries=1, keys=65, heads=2, kv_heads=1), dict(causal=True)),
    "m5-n70-cached-lengths": (dict(queries=5, keys=70, lengths=True), dict(causal=True)),
    "m70-n33-causal": (dict(queries=70, keys=33, heads=1), dict(causal=True)),
    "d16": (dict(queries=33, head_dim=16, batch=1), {}),
    "d48-plain": (dict(queries=33, head_dim=48, batch=1, radius=None, qk_norm=False), {}),
    "d64": (dict(queries=33, head_dim=64, batch=1, radius=None), {}),
    "d80": (dict(queries=33, head_dim=80, batch=1, qk_norm=False), {}),
    "d128": (dict(queries=33, head_dim=128, batch=1), {}),
    "radius0": (dict(queries=17, radius=0, heads=1), {}),
    "radius1": (dict(queries=17, radius=1, heads=1), {}),
    "few_entries": (dict(queries=2, keys=80, head_dim=100, radius=1, heads=2), {}),
    "extreme_logits": (dict(queries=17, qk_norm=False, batch=1), dict(scale=300.0)),
    "negative_scale": (dict(queries=17, batch=1), dict(scale=-2.0)),
}
# The softmax of these is 0 or 1, so gradients of what lies before it cancel to (almost) nothing.
SATURATED = {"n1", "extreme_logits"}
SLOW_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"n{n}-{'per_sample' if own else 'shared'}": (
        dict(queries=n, heads=1, batch=1, codes_per_sample=own, lengths=own, radius=400), {},
    )
    for n in (372, 744)
    for own in (False, True)
}  # fmt: skip


QUICK_IN_16_BITS = {"n1", "n17-per_sample-mask-lengths", "d48-plain", "extreme_logits"}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# On a GPU none is slow.
DTYPES = [
    pytest.param(dtype, id=name_of(dtype), marks=[pytest.mark.slow] if dtype.itemsize < 4 else [])
    for dtype in _triton_target.DTYPES
]


def terms(wide: dict[str, Any], grad: torch.Tensor, scale: float | None = None) -> dict[str, float]:
    """What the rounding of a saturated softmax's gradients is relative to, without QK norm.

    dS = P (dP - delta). Torch takes delta from P and dP, and where P is 1 the difference is
    exactly 0; a kernel that takes it from dO and O, as every flash attention, leaves the rounding
    of two equal sums of size |dP|. And P is recomputed from similarities S of which the forward
    pass has seen another rounding: a relative error of P as large as the rounding of S.
    """
    scale = wide["q"].shape[-1] ** -0.5 if scale is None else scale
    q, k, v, table = (wide[n].detach() for n in ("q", "k", "v", "bias_table"))
    p = (q @ k.mT * scale + offset_bias(table, wide["q_codes"], wide["k_codes"])).softmax(-1)
    grad = grad.double().abs()
    ds = 2 * p * (grad @ v.abs().mT)
    similarity = scale * (q.abs() @ k.abs().mT).max().item()
    return {
        "q": (scale * ds @ k.abs()).max().item(),
        "k": (scale * ds.mT @ q.abs()).max().item(),
        "v": (1 + similarity) * (p.mT @ grad).max().item(),
        "bias_table": ds.sum((0, 2, 3)).max().item(),
    }


def compare(
    inputs: dict[str, Any],
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    case: str = "",
) -> dict[str, torch.Tensor]:
    """Output and every gradient against the float64 oracle; returns the kernel's."""
    options = dict(options)
    device = inputs["q"].device
    if "dropout_seed" in options:
        options["dropout_seed"] = torch.tensor([options["dropout_seed"]], device=device)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(inputs["q"].shape, generator=generator).to(device=device, dtype=dtype)
    wide = testing.to_float64(inputs)
    results = []
    for function, given in (
        (functools.partial(attention, backend="triton"), inputs),
        (lambda **a: attention_reference(**a, upcast=False), inputs),
        (attention_reference, wide),
    ):
        with testing.poisoned_memory():
            out = function(**given, **options)
            results.append({"out": out, **testing.gradients(out, given, grad)})
    eps = torch.finfo(dtype).eps
    floors = {}
    if case in SATURATED:
        sizes = terms(wide, grad, options.get("scale"))
        floors = {name: testing.FLOOR_ULPS * eps * size for name, size in sizes.items()}
    rounding = testing.attention_rounding(inputs, grad, **options)
    for name in results[0]:
        ours, same, oracle = (r[name] for r in results)
        assert ours.dtype == same.dtype
        if name in floors:
            floor = floors[name]
            assert (ours.double() - oracle).abs().max().item() <= floor, name
            continue
        testing.assert_close_to_oracle(
            name, ours, same, oracle, dtype=dtype, rounding=rounding.get(name, 0.0)
        )
    return results[0]


def parity_cases() -> Iterator[Any]:
    """Every case in every dtype; those are slow that take the interpreter seconds."""
    for case in [*CASES, *SLOW_CASES]:
        for dtype in _triton_target.DTYPES:
            slow = case in SLOW_CASES or (dtype != torch.float32 and case not in QUICK_IN_16_BITS)
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(case, dtype, id=f"{case}-{name_of(dtype)}", marks=marks)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), list(parity_cases()))
def test_outputs_and_gradients(case: str, dtype: torch.dtype, device: str) -> None:
    shapes, options = (CASES | SLOW_CASES)[case]
    if case == "extreme_logits" and dtype != torch.float32:
        options = options | dict(scale=30.0)
    inputs = testing.attention_inputs(**shapes, dtype=dtype, device=device)
    out = compare(inputs, options, dtype, case)["out"]
    assert out.transpose(1, 2).is_contiguous()  # stored as (B, M, H, D)


@pytest.fixture(params=[True, False], ids=["stored", "recomputed"])
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the backward keeps dS or computes it again; a call's shapes decide otherwise."""
    monkeypatch.setattr(_triton_backward, "_stores_ds", lambda *_: request.param)
    monkeypatch.setattr(_triton_plan, "_plans", {})
    return bool(request.param)


@pytest.mark.gpu
@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    "case",
    [
        "n17-per_sample-mask-lengths", "n65-per_sample-dropout-mask", "n130-causal-no_norm",
        "m70-n33-causal", "d48-plain",
    ],
)  # fmt: skip
def test_gradients_whether_ds_is_kept_or_not(case: str, device: str) -> None:
    shapes, options = CASES[case]
    compare(testing.attention_inputs(**shapes, device=device), options)


def with_codes(
    q_codes: torch.Tensor, k_codes: torch.Tensor, radius: int, device: str, **shapes: Any
) -> dict[str, Any]:
    inputs = testing.attention_inputs(
        queries=q_codes.shape[-1], keys=k_codes.shape[-1], radius=radius, device=device, **shapes
    )
    return inputs | dict(q_codes=q_codes.int().to(device), k_codes=k_codes.int().to(device))


LOWEST, HIGHEST = -(2**31), 2**31 - 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_an_entry_that_all_pairs_share_has_no_gradient(dtype: torch.dtype, device: str) -> None:
    """A row of dS sums to zero, whatever the rounding of the output leaves in delta."""
    inputs = testing.attention_inputs(
        queries=2, keys=80, head_dim=100, radius=1, heads=2, batch=1, qk_norm=False, dtype=dtype,
        device=device,
    )  # fmt: skip
    inputs["q_codes"], inputs["k_codes"] = inputs["q_codes"] * 0, inputs["k_codes"] + 1000
    grad = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(0))
    out = attention(**inputs, backend="triton")
    found = testing.gradients(out, inputs, grad.to(device=device, dtype=dtype))["bias_table"]
    assert found.abs().max() < 1e-5  # 3e-3 in float16 from the rounded output


@pytest.mark.gpu
@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("codes", "radius"),
    [
        ([LOWEST, LOWEST, LOWEST + 1, -3, 0, 2, HIGHEST - 1, HIGHEST, HIGHEST], 4),
        ([LOWEST, HIGHEST], 4),
        ([7, 7, 7, 9, 7, 9, 9], 3),  # repeated
        ([0, 100, 200, 300, 400], 5),  # all clamped but the diagonal
        ([5, -2, 9, 0, 3, 3, -8, 5], 6),  # neither sorted nor distinct
    ],
    ids=["int32", "int32-far", "repeated", "clamped", "unsorted"],
)
def test_any_codes_are_safe(codes: list[int], radius: int, device: str) -> None:
    own = torch.tensor(codes)
    compare(with_codes(own, own, radius, device, batch=1, heads=2), {})


@pytest.mark.gpu
@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    "codes",
    [
        [[0, 128, 256, 1, 129, -128], [0, 1, 2, 3, 4, 5]],  # one slot, two codes
        [[7, 7, 3, 7, 9, 9], [7, 3, 1, 0, 9, 2]],  # one code twice
        [[5, -2, 9, 0, 3, 8], [3, 9, 1, 30, 2, 4]],  # neither
    ],
    ids=["slots", "repeated", "distinct"],
)
def test_codes_of_samples_that_clash(
    codes: list[list[int]], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(_triton_table, "INDEX_BYTES", 0)  # the fewest slots, 128
    own = torch.tensor(codes)
    compare(with_codes(own, own, 400, device, batch=2, heads=1, key_mask=True), {})


def test_launches_do_not_depend_on_the_shapes() -> None:
    """Six, of which torch's zeros is one, whatever the batch; memory beside dS stays bounded."""
    found: list[Any] = []
    for batch, tokens in ((1, 64), (64, 744), (64, 2048), (4, 20_000)):
        found.clear()
        q = torch.empty(batch, tokens, 8, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        table = torch.empty(8, 9001, device="meta")
        codes = torch.empty(batch, tokens, dtype=torch.int32, device="meta")
        scale = torch.empty(64, device="meta")
        options = (table, codes, codes, None, None, scale, scale, None, 0.125, False, 0.0)
        with _triton_target.recorded_launches(lambda *launch: found.append(launch), "sm_90"):
            lse = torch.empty(q.shape[:3], device="meta")
            _triton.backward(q, q, q, q, q, lse, *options)
        assert len(found) == 5, [f[0].__name__ for f in found]
        beside = 0
        for _, _, arguments, _ in found:
            if arguments.get("ds") is not None:
                assert arguments["ds"].nbytes <= _triton_backward.DS_BYTES
            if "scratch" in arguments:
                names = ("scratch", "partial", "inverse")
                beside = sum(arguments[n].untyped_storage().nbytes() for n in names)
        assert beside <= 128 << 20


@pytest.mark.gpu
def test_fuzzed_codes(device: str) -> None:
    generator = random.Random(0)
    for _ in range(4):
        radius = generator.choice([1, 2, 9, 33])
        pool = [generator.choice([0, LOWEST, HIGHEST, 40]) for _ in range(3)]
        draw = [
            [
                max(LOWEST, min(HIGHEST, generator.choice(pool) + generator.randint(-50, 50)))
                for _ in range(2 * length)
            ]
            for length in (11, 19)
        ]
        q_codes, k_codes = (torch.tensor(c).view(2, -1) for c in draw)
        compare(with_codes(q_codes, k_codes, radius, device, heads=1), {})


@pytest.mark.gpu
@pytest.mark.usefixtures("stored")
def test_grid_codes_with_patch_dropout(device: str) -> None:
    height, width = 3, 13
    codes = grid_codes(height, width)
    kept = torch.stack([torch.randperm(height * width)[:28].sort().values for _ in range(3)])
    radius = (height - 1) * (2 * width - 1) + width
    compare(with_codes(codes[kept], codes[kept], radius, device, batch=3, heads=2), {})


@pytest.mark.gpu
def test_queries_that_see_no_key_are_zero(device: str) -> None:
    inputs = testing.attention_inputs(
        queries=19, batch=3, heads=1, key_mask=True, lengths=True, device=device
    )
    inputs["key_padding_mask"][0] = False
    inputs["key_lengths"][:] = torch.tensor([19, 0, 19])
    found = compare(inputs, {})
    for name in ("out", "q", "k", "v"):
        assert found[name][:2].eq(0).all()
        assert found[name][2].ne(0).any()


@pytest.mark.gpu
def test_key_lengths_out_of_range_are_clamped(device: str) -> None:
    inputs = testing.attention_inputs(queries=9, batch=2, heads=1, device=device)
    inputs["key_lengths"] = torch.tensor([-4, 1000], device=device)
    compare(inputs, {})


@pytest.mark.gpu
def test_strided_inputs(device: str) -> None:
    inputs = testing.attention_inputs(
        queries=18, keys=24, batch=2, heads=2, key_mask=True, device=device
    )
    for name in ("q", "k", "v"):
        wide = inputs[name].detach().repeat_interleave(2, dim=-1).requires_grad_()
        inputs[name] = wide[..., ::2].detach().requires_grad_()
    inputs["k_codes"] = inputs["k_codes"].repeat_interleave(2)[::2]
    inputs["key_padding_mask"] = inputs["key_padding_mask"].t().contiguous().t()
    inputs["bias_table"] = inputs["bias_table"].detach().t().contiguous().t().requires_grad_()
    assert not inputs["bias_table"].is_contiguous()
    compare(inputs, {})


@pytest.mark.gpu
def test_calls_of_one_layout_share_a_plan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tensors hold, and whatever their addresses, on which Triton specialises."""
    plans: dict[Any, Any] = {}
    monkeypatch.setattr(_triton_plan, "_plans", plans)
    for offset, factor in ((0, 1.0), (0, 2.0), (1, 3.0)):
        inputs = testing.attention_inputs(queries=9, batch=2, heads=1, key_mask=True, device=device)
        for name in ("q", "k", "v", "bias_table"):
            memory = inputs[name].new_empty(inputs[name].numel() + offset)
            moved = memory[offset:].view(inputs[name].shape)
            inputs[name] = moved.copy_(inputs[name].detach() * factor).requires_grad_()
        compare(inputs, {})
        assert len(plans) == 2


@pytest.mark.gpu
def test_zero_vectors_have_the_gradient_of_normalize(device: str) -> None:
    inputs = testing.attention_inputs(queries=9, batch=1, heads=1, device=device)
    with torch.no_grad():
        inputs["v"][0, 0, 2] = 0.0
        inputs["q"][0, 0, 3] = 1e-15
    found = compare(inputs, {})
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shapes",
    [dict(batch=0), dict(queries=0, keys=5), dict(queries=5, keys=0), dict(queries=0, keys=0)],
    ids=["batch", "queries", "keys", "both"],
)
def test_empty_inputs(shapes: dict[str, int], device: str) -> None:
    found = compare(testing.attention_inputs(**({"queries": 5} | shapes), device=device), {})
    assert all(value.eq(0).all() for value in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_bits_of_200_runs(causal: bool, head_dim: int, dtype: torch.dtype, device: str) -> None:
    """Nothing is added atomically, and no load overtakes the product that reads it."""
    batch, heads, queries, runs = (1, 2, 17, 2) if INTERPRETED else (2, 4, 700, 200)
    inputs = testing.attention_inputs(
        batch, heads, queries, None, head_dim, kv_heads=heads // 2, radius=400,
        codes_per_sample=True, key_mask=True, dtype=dtype, device=device,
    )  # fmt: skip
    first: dict[str, torch.Tensor] = {}
    for run in range(runs):
        out = attention(**inputs, causal=causal, backend="triton")
        found = {"out": out, **testing.gradients(out, inputs, torch.ones_like(out))}
        first = first or found
        for name, value in found.items():
            assert torch.equal(value, first[name]), (run, name)


@pytest.mark.gpu
def test_expanded_gradient_of_the_output(device: str) -> None:
    inputs = testing.attention_inputs(queries=9, batch=1, heads=1, device=device)
    ours = testing.gradients(
        attention(**inputs, backend="triton"),
        inputs,
        torch.ones((), device=device).expand(inputs["q"].shape),
    )
    want = testing.gradients(attention_reference(**inputs), inputs, torch.ones_like(inputs["q"]))
    for name, value in want.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_opcheck(device: str) -> None:
    inputs = testing.attention_inputs(
        queries=5, keys=9, batch=1, heads=2, kv_heads=1, head_dim=16, key_mask=True, lengths=True,
        device=device,
    )  # fmt: skip
    arguments = _triton._complete(inputs) | dict(
        dropout_p=0.2, dropout_seed=torch.tensor([SEED], device=device), causal=True
    )
    torch.library.opcheck(
        torch.ops.musiclm_fast.attention_forward_triton.default,
        tuple(arguments[name] for name in _autograd.ARGUMENTS),
    )


@pytest.mark.gpu
def test_compiles_in_one_graph(device: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(
        functools.partial(attention, backend="triton"), fullgraph=True, dynamic=True,
        backend="aot_eager" if INTERPRETED else "inductor",
    )  # fmt: skip
    for queries in (5, 9):
        inputs = testing.attention_inputs(
            queries=queries, batch=2, heads=1, head_dim=16, device=device
        )
        out = function(**inputs)
        eager = attention(**inputs, backend="triton")
        torch.testing.assert_close(out, eager, atol=0, rtol=0)
        grad = torch.ones_like(out)
        ours, want = (testing.gradients(o, inputs, grad) for o in (out, eager))
        for name, value in want.items():
            torch.testing.assert_close(ours[name], value, atol=0, rtol=0)


@pytest.mark.gpu
def test_inference_mode_and_checkpointing(device: str) -> None:
    inputs = testing.attention_inputs(queries=9, batch=1, heads=1, device=device)
    options = dict(dropout_p=0.4, dropout_seed=torch.tensor([3], device=device), backend="triton")
    plain = attention(**inputs, **options)
    with torch.inference_mode():
        assert torch.equal(attention(**inputs, **options), plain)
    again = torch.utils.checkpoint.checkpoint(
        functools.partial(attention, **inputs, **options), use_reentrant=False
    )
    grad = torch.ones_like(plain)
    ours, want = (testing.gradients(o, inputs, grad) for o in (again, plain))
    for name, value in want.items():
        assert torch.equal(ours[name], value), name


@interpreted
def test_self_check_passes() -> None:
    assert _triton.self_check(torch.device("cpu"), torch.float32) is None


# Which kernel's arguments to spoil: in the first case, with a mask and dropout, or in the second,
# causal, with lengths and another head dim.
SPOILED: dict[str, tuple[str, int, Callable[[dict[str, Any]], Any]]] = {
    "scale": ("stored_q_kernel", 64, lambda a: {"scale": a["scale"] * 1.01}),
    "scale again": ("backward_q_kernel", 48, lambda a: {"scale": a["scale"] * 1.01}),
    "mask": ("forward_kernel", 64, lambda a: {"key_mask": torch.ones_like(a["key_mask"])}),
    "dropout": ("backward_kv_kernel", 64, lambda a: {"seed": a["seed"] + 1}),
    "causal": ("forward_kernel", 48, lambda a: {"CAUSAL": False}),
    "lengths": ("backward_kv_kernel", 48, lambda a: {"key_lengths": a["key_lengths"] + 1}),
    "norm": ("normalize_kernel", 48, lambda a: {"scale": a["scale"] * 1.01}),
    "norm again": ("prepare_kernel", 48, lambda a: {"k_scale": a["k_scale"] * 1.01}),
    "delta": ("prepare_kernel", 64, lambda a: {"out": a["out"] * 1.01}),
    "positions": ("backward_table_kernel", 64, lambda a: {"inverse": a["inverse"].roll(1)}),
    "ranks": ("backward_table_kernel", 48, lambda a: {"ranks": torch.zeros_like(a["ranks"])}),
    "edges": ("backward_table_kernel", 48, lambda a: {"radius": a["radius"] - 1}),
}


@interpreted
@pytest.mark.parametrize("kernel, head_dim, change", SPOILED.values(), ids=SPOILED)
def test_self_check_sees_a_wrong_kernel(
    kernel: str, head_dim: int, change: Callable[[dict[str, Any]], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    launch = _triton_target.launch

    def wrong(
        launched: Any, programs: int, arguments: dict[str, Any], options: dict[str, int]
    ) -> None:
        if launched.__name__ == kernel and arguments.get("HEAD_DIM", 0) == head_dim:
            arguments = arguments | change(arguments)
        launch(launched, programs, arguments, options)

    monkeypatch.setattr(_triton_target, "launch", wrong)
    assert "error" in str(_triton.self_check(torch.device("cpu"), torch.float32))


@interpreted
@pytest.mark.slow
def test_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_attention_gpu as bench

    monkeypatch.setattr(bench, "HEAD_DIM", 16)
    monkeypatch.setattr(bench, "HEIGHT", 4)
    found = bench.measure(24, 24, 1, "cpu", torch.float32, rounds=1, repeats=1)
    timed = [r for r in found if r.seconds]
    assert [r.contender for r in timed] == 2 * [
        "ours, shared", "ours, per sample", "ours, QK norm", "flash", "SDPA + bias",
    ]  # fmt: skip
    assert all(r.operations for r in timed)
    absent = {r.contender: r.reason for r in found if not r.seconds}
    assert set(absent) == set(bench.PEERS) - {r.contender for r in timed}
    assert all(absent.values())


@interpreted
@pytest.mark.slow
def test_benchmark_refuses_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_attention_gpu as bench

    monkeypatch.setattr(bench, "HEAD_DIM", 16)
    monkeypatch.setattr(bench, "HEIGHT", 4)
    monkeypatch.setattr(bench, "ours", lambda a: attention(**a, backend="triton") * 1.001)
    with pytest.raises(AssertionError, match="error"):
        bench.measure(24, 24, 1, "cpu", torch.float32, rounds=1, repeats=1)


@compiled
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_parity_in_the_interpreter(marks: str, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-m", marks],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=request.config.rootpath, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_refusals_give_reasons() -> None:
    q = torch.zeros(1, 1, 2, 32)
    if not INTERPRETED:
        ok, reason = _triton.supports(q=q)
        assert not ok
        assert "CUDA" in reason
    meta = q.to("meta")
    assert "meta" in _triton.supports(q=meta)[1]
    with pytest.raises(RuntimeError, match="triton"):
        attention(meta, meta, meta, backend="triton")


@compiled
def test_import_does_not_load_the_kernels() -> None:
    kernels = "musiclm_fast.ops.attention._triton_kernels"
    code = f"import sys, musiclm_fast.ops; assert {kernels!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@compiled
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
class TestOnGpu:
    """What only a device has."""

    def test_a_captured_step_replays_on_new_inputs(self) -> None:
        inputs = testing.attention_inputs(
            queries=130, codes_per_sample=True, key_mask=True, lengths=True, device="cuda",
            dtype=torch.bfloat16,
        )  # fmt: skip
        grad = torch.randn_like(inputs["q"])

        def step() -> dict[str, torch.Tensor]:
            out = attention(**inputs, backend="triton")
            return {"out": out, **testing.gradients(out, inputs, grad)}

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            inputs["q"].copy_(torch.randn_like(inputs["q"]))
        graph.replay()
        for name, value in step().items():
            assert torch.equal(captured[name], value), name

    @pytest.mark.parametrize("dtype", _triton_target.DTYPES)
    def test_self_check_passes(self, dtype: torch.dtype) -> None:
        assert _triton.self_check(torch.device("cuda"), dtype) is None

    def test_workspace_of_a_backward_is_at_most_64_megabytes(self) -> None:
        inputs = testing.attention_inputs(
            batch=16, heads=8, queries=2048, head_dim=64, radius=2048, codes_per_sample=True,
            dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        out = attention(**inputs, backend="triton")
        grad = torch.randn_like(out)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        testing.gradients(out, inputs, grad)
        # Without what the allocator adds to each, which depends on what it has in store.
        used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        one = out.numel() * out.element_size()
        # Gradients of q, k and v, normalised q and k, delta; the rest is workspace.
        assert used <= 5 * one + out.numel() // 64 * 4 + (64 << 20) + (8 << 20)
