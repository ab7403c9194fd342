"""One token through all layers: the kernel against the float64 definition, and the contract."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from musiclm_fast import _extension, testing
from musiclm_fast._dispatch import BackendError
from musiclm_fast.audiolm.decoder import decode_weights
from musiclm_fast.audiolm.transformer import Transformer
from musiclm_fast.ops import decode
from musiclm_fast.ops.decode import DecodeWeights

cpp = pytest.mark.skipif(not _extension.load(), reason=_extension.why_missing())

SIZES: dict[str, Any] = dict(dim=48, depth=3, heads=6, dim_head=32)
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cross attention": dict(cross_attend=True),
    "one stream": dict(num_residual_streams=1),
    "many streams": dict(num_residual_streams=7),
    "null keys and a norm": dict(num_null_kv=3, norm_context=True),
    "no value residual": dict(add_value_residual=False),
    "odd sizes": dict(dim=37, depth=2, heads=3, dim_head=11, cross_attend=True),
    "one of each": dict(dim=1, depth=1, heads=1, dim_head=1),
    "wide": dict(dim=160, depth=2, heads=8, dim_head=64, cross_attend=True),
}


def weights_of(seed: int = 0, **options: Any) -> DecodeWeights:
    torch.manual_seed(seed)
    random.seed(seed)  # a connection draws its first stream from it
    transformer = Transformer(rel_pos_bias=False, **{**SIZES, **options}).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        return decode_weights(transformer)


def arguments(
    weights: DecodeWeights, rows: int = 2, length: int = 20, *, contexts: int = 5,
    bias: bool = True, masks: bool = True, seed: int = 1,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def mask(keys: int) -> Tensor:
        seen = torch.rand(rows, keys, generator=generator) < 0.6
        seen[:, 0] = True
        return seen

    depth, keys = len(weights.layers), weights.nulls + length + 1
    found: dict[str, Any] = dict(
        x=normal(rows, weights.dim),
        keys_values=normal(depth, 2, rows, length + 3, weights.dim_head),
        length=length,
    )
    if weights.cross:
        found["context"] = normal(depth, 2, rows, contexts, weights.dim_head)
        found["context_mask"] = mask(contexts) if masks else None
    if bias:
        found["bias_table"] = normal(weights.heads, 2 * length + 5)
        found["q_code"] = torch.tensor([length], dtype=torch.int32)
        codes = torch.arange(keys, dtype=torch.int32) - weights.nulls
        codes[0] = -(2**31)  # a difference that does not fit
        found["k_codes"] = codes
    if masks:
        found["key_padding_mask"] = mask(keys)
    return found


def double(value: Any) -> Any:
    """The same with every floating tensor in float64, as copies."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(double(part) for part in value)
    if isinstance(value, dict):
        return {name: double(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: double(getattr(value, f.name)) for f in fields(value)}
        return replace(value, **parts)
    return value


def run(weights: DecodeWeights, call: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """The output, and keys and values afterwards."""
    keys_values = call["keys_values"].clone()
    with torch.no_grad():
        out = decode(weights=weights, backend=backend, **{**call, "keys_values": keys_values})
    return out, keys_values


def condition(weights: DecodeWeights, call: dict[str, Any], draws: int = 16) -> list[float]:
    """How far the exact results move where the cache does by eps: the output, the new keys."""
    exact, wide, length = double(replace(weights, packed={})), double(call), call["length"]
    out, cache = run(exact, wide, "torch")
    eps, moved = torch.finfo(torch.float32).eps, [0.0, 0.0]
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, cache.shape, generator=generator) * 2 - 1
        near = {**wide, "keys_values": wide["keys_values"] * (1 + eps * signs)}
        found, found_cache = run(exact, near, "torch")
        new = (found_cache - cache)[..., length, :]
        moved = [max(m, x.abs().max().item()) for m, x in zip(moved, (found - out, new))]
    return moved


def check(weights: DecodeWeights, *calls: dict[str, Any], saturated: bool = False) -> None:
    """The results of the calls, compared together.

    ``saturated``: weights hang on the rounding of a tie, and results on :func:`condition`.
    """
    with testing.poisoned_memory():
        actual = [run(weights, call, "cpp") for call in calls]
    same = [run(weights, call, "torch") for call in calls]
    exact = double(replace(weights, packed={}))
    oracle = [run(exact, double(call), "torch") for call in calls]
    rounding = [0.0, 0.0]
    if saturated:
        rounding = [max(moved) for moved in zip(*(condition(weights, call) for call in calls))]
    for index, name in enumerate(("out", "keys_values")):
        values = (torch.stack([r[index] for r in results]) for results in (actual, same, oracle))
        testing.assert_close_to_oracle(name, *values, rounding=rounding[index])


@cpp
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_cpp_equals_the_definition(options: dict[str, Any], simd_level: str) -> None:
    weights = weights_of(**options)
    for extras in (dict(bias=True, masks=True), dict(bias=False, masks=False)):
        check(weights, arguments(weights, rows=16, **extras))


@cpp
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 6, 7, 13, 16, 17, 35])
def test_cpp_at_any_number_of_rows(rows: int, simd_level: str) -> None:
    weights = weights_of(cross_attend=True)
    check(weights, arguments(weights, rows))


@cpp
@pytest.mark.parametrize("length", [0, 1, 14, 15, 16, 31, 32, 300])
def test_cpp_at_any_length(length: int) -> None:
    weights = weights_of(num_null_kv=1)
    for masks in (True, False):
        check(weights, arguments(weights, length=length, masks=masks))


@cpp
def test_cpp_on_extreme_values() -> None:
    weights = weights_of(cross_attend=True)
    call = arguments(weights, rows=16)
    for factor in (0.0, 1e-30, 1e4):
        check(weights, {**call, "x": call["x"] * factor})
    draws = [arguments(weights, rows=16, seed=seed) for seed in range(1, 9)]
    saturated = ({**draw, "keys_values": draw["keys_values"] * 300} for draw in draws)
    check(weights, *saturated, saturated=True)
    hidden = torch.zeros_like(call["key_padding_mask"])
    check(weights, {**call, "key_padding_mask": hidden})
    check(weights, {**call, "context_mask": torch.zeros_like(call["context_mask"])})
    out, _ = run(weights, {**call, "x": torch.full_like(call["x"], torch.nan)}, "cpp")
    assert out.isnan().all()


@cpp
def test_cpp_rows_do_not_see_each_other() -> None:
    """Bit for bit: a sample does not depend on how many are drawn with it."""
    weights = weights_of(cross_attend=True)
    call = arguments(weights, rows=16)
    together, cache = run(weights, call, "cpp")
    for row in range(16):
        own = dict(call, x=call["x"][row : row + 1])
        for name in ("keys_values", "context"):
            own[name] = call[name][:, :, row : row + 1].contiguous()
        for name in ("key_padding_mask", "context_mask"):
            own[name] = call[name][row : row + 1]
        alone, own_cache = run(weights, own, "cpp")
        assert torch.equal(alone[0], together[row])
        assert torch.equal(own_cache[:, :, 0], cache[:, :, row])


@cpp
def test_cpp_threads_change_nothing() -> None:
    weights = weights_of(dim=256, cross_attend=True)
    call = arguments(weights, rows=5, length=100)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(weights, call, "cpp")[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@cpp
def test_cpp_strided_inputs() -> None:
    weights = weights_of(cross_attend=True)
    call = arguments(weights)
    strided = {**call, "x": call["x"].t().contiguous().t()}
    strided["context"] = call["context"].transpose(3, 4).contiguous().transpose(3, 4)
    strided["bias_table"] = call["bias_table"].t().contiguous().t()
    assert torch.equal(run(weights, strided, "cpp")[0], run(weights, call, "cpp")[0])


@cpp
def test_opcheck_cpp() -> None:
    from musiclm_fast.ops.decode import _cpp

    weights = weights_of(cross_attend=True, depth=1)
    call = arguments(weights)
    run(weights, call, "cpp")
    packed, sizes = weights.packed["cpp"]
    names = (
        "context", "context_mask", "bias_table", "q_code", "k_codes", "key_padding_mask",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.musiclm_fast.decode_step,
        (call["x"], packed, call["keys_values"], 20, *(call[n] for n in names), sizes),
    )
    with pytest.raises(RuntimeError, match="too few"):
        torch.ops.musiclm_fast.decode_pack(_cpp._parameters(weights)[:-1], sizes)
    with pytest.raises(RuntimeError, match="length"):
        torch.ops.musiclm_fast.decode_step(
            call["x"], packed, call["keys_values"], 23, *(call[n] for n in names), sizes
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(2, 47)), "x: got"),
        (dict(x=torch.zeros(3, 48)), "keys_values: got"),
        (dict(x=torch.zeros(2, 48, dtype=torch.int64)), "x: got"),
        (dict(length=23), "length: got 23"),
        (dict(length=-1), "length: got -1"),
        (dict(context=None), "context: got None"),
        (dict(context_mask=torch.ones(2, 4, dtype=torch.bool)), "context_mask: got"),
        (dict(bias_table=None), "all three or none"),
        (dict(bias_table=torch.zeros(6, 4)), "odd number"),
        (dict(k_codes=torch.zeros(20, dtype=torch.int32)), "k_codes: got"),
        (dict(q_code=torch.zeros(1, dtype=torch.int64)), "q_code: got"),
        (dict(key_padding_mask=torch.ones(2, 20, dtype=torch.bool)), "key_padding_mask: got"),
        (dict(key_padding_mask=torch.ones(2, 21)), "key_padding_mask: got"),
    ],
)
def test_bad_calls(changes: dict[str, Any], message: str) -> None:
    weights = weights_of(cross_attend=True)
    call = {**arguments(weights), **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        decode(weights=weights, **call)


def test_refusals() -> None:
    weights = weights_of()
    call = arguments(weights)
    with pytest.raises(BackendError, match=r"no gradient|not built"):
        decode(weights=weights, backend="cpp", **{**call, "x": call["x"].requires_grad_()})
    wide = double(replace(weights, packed={}))
    with pytest.raises(BackendError, match=r"float32|not built"):
        decode(weights=wide, backend="cpp", **double(call))


def test_the_definition_is_the_transformers_forward() -> None:
    """Token by token with a cache, against one pass over all tokens."""
    torch.manual_seed(0)
    transformer = Transformer(**{**SIZES, "num_null_kv": 2}).double().eval()
    weights = decode_weights(transformer)
    tokens = torch.randn(2, 9, SIZES["dim"], dtype=torch.float64)
    keys_values = torch.zeros(3, 2, 2, 9, SIZES["dim_head"], dtype=torch.float64)
    with torch.no_grad():
        whole = transformer(tokens)
        for i in range(9):
            out = decode(tokens[:, i], weights, keys_values, i, backend="torch")
            torch.testing.assert_close(out, whole[:, i], rtol=1e-9, atol=1e-9)
