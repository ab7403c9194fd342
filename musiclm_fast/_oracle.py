"""The rule by which a kernel's results are held against float64.

A kernel's error against the float64 reference is at most twice the error of the same-dtype torch
path, plus a floor of a few units in the last place of the largest value::

    max|ours - oracle| <= 2 max|same_dtype - oracle| + floor_ulps * eps(dtype) * max|oracle|

The factor allows a kernel to sum in another order. The floor covers outputs on which the torch
path happens to be exact. Where an intermediate result is rounded and the output is sensitive to
it, the floor also includes the effect of that rounding: eps times a condition number, computed in
float64 from the inputs (``ops/<op>/_parity.py``). Nothing here is tuned per op, device or shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOOR_ULPS = 8.0


def assert_close_to_oracle(
    name: str,
    actual: Tensor,
    same_dtype: Tensor,
    oracle: Tensor,
    *,
    floor_ulps: float = FLOOR_ULPS,
    dtype: torch.dtype | None = None,
    rounding: float = 0.0,
) -> None:
    """Check ``actual`` against a float64 oracle by the module's rule.

    Args:
        name: what is compared, for the message.
        actual: the kernel's result.
        same_dtype: the torch path's result, computed in the kernel's dtype.
        oracle: the torch path's result in float64.
        floor_ulps: the floor, in units of eps(dtype) * max|oracle|.
        dtype: whose eps counts (default: ``actual``'s); the input's dtype where a kernel returns
            float32 gradients of values that were computed from half precision.
        rounding: a bound on the effect of rounding intermediate results, added to the floor.

    Raises:
        AssertionError: shapes differ, ``actual`` is not finite where the oracle is, or the error
            is too large; with all three numbers.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)} != {tuple(oracle.shape)}")
    if oracle.numel() == 0:
        return
    eps = torch.finfo(dtype or actual.dtype).eps
    oracle = oracle.detach().double()
    error = (actual.detach().double() - oracle).abs().max().item()
    yardstick = (same_dtype.detach().double() - oracle).abs().max().item()
    floor = floor_ulps * eps * oracle.abs().max().item() + rounding
    floor += torch.finfo(torch.float32).tiny
    if not error <= 2.0 * yardstick + floor:
        raise AssertionError(
            f"{name}: error {error:.3e} > 2 x {yardstick:.3e} (torch path) + {floor:.3e} (floor)"
        )


def first_difference(
    what: str,
    results: Sequence[Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    rounding: Mapping[str, float] | None = None,
) -> str | None:
    """The error of the first result that breaks the rule; None if all keep it.

    Args:
        what: the case, for the message.
        results: by name: the kernel's, the torch path's, the oracle's.
        dtype: as in :func:`assert_close_to_oracle`.
        rounding: likewise, by name.
    """
    for name in results[0]:
        bound = 0.0 if rounding is None else rounding[name]
        values = (found[name] for found in results)
        try:
            assert_close_to_oracle(f"{name} ({what})", *values, dtype=dtype, rounding=bound)
        except AssertionError as error:
            return str(error)
    return None


def to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating tensor in float64, as new leaves."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def gradients(output: Tensor, arguments: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Gradients of ``<output, grad>`` for every argument that requires one, by name."""
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
    found = torch.autograd.grad(
        output, [arguments[n] for n in names], grad.to(output.dtype), allow_unused=True
    )
    return {
        n: torch.zeros_like(arguments[n]) if g is None else g
        for n, g in zip(names, found, strict=True)
    }
