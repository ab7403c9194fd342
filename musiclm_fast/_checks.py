"""Checks of arguments: one clear error that names the argument, what came and what is allowed.

All checks read shapes, dtypes and Python values only, so they add no host synchronisation and
trace under ``torch.compile``. The few that must read a tensor's values say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A tensor holds NaN or infinity."""


def fail(name: str, got: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` saying that argument ``name`` is ``got`` where ``allowed`` is allowed."""
    raise error(f"{name}: got {got}, expected {allowed}")


def describe(value: Any) -> str:
    """Short description of a value for an error message."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {kind} of dtype {value.dtype} and shape {tuple(value.shape)}"
    shown = repr(value)
    if len(shown) > 120:
        shown = f"{shown[:120]}..."
    return f"{shown} ({kind})"


def check_tensor(name: str, value: Any) -> None:
    """``value`` is a tensor, else TypeError."""
    if not isinstance(value, Tensor):
        fail(name, describe(value), "a torch.Tensor", TypeError)


def check_ndim(name: str, value: Tensor, ndims: int | Sequence[int], meaning: str) -> None:
    """``value`` is a tensor with one of ``ndims`` dimensions; ``meaning`` spells the shape."""
    check_tensor(name, value)
    allowed = (ndims,) if isinstance(ndims, int) else tuple(ndims)
    if value.ndim not in allowed:
        fail(name, describe(value), f"shape {meaning}")


def check_shape(name: str, value: Tensor, shape: Sequence[int | None], meaning: str) -> None:
    """``value``'s shape equals ``shape``, where None matches any size."""
    check_tensor(name, value)
    same_rank = value.ndim == len(shape)
    if not same_rank or any(
        want is not None and have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        wanted = tuple("*" if size is None else size for size in shape)
        fail(name, describe(value), f"shape {meaning} = {wanted}".replace("'", ""))


def check_floating(name: str, value: Tensor) -> None:
    """``value`` is a floating-point tensor."""
    check_tensor(name, value)
    if not value.is_floating_point():
        fail(name, describe(value), "a floating-point tensor", TypeError)


def check_dtype(name: str, value: Tensor, dtypes: torch.dtype | Sequence[torch.dtype]) -> None:
    """``value`` has one of ``dtypes``."""
    check_tensor(name, value)
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        fail(name, describe(value), f"dtype {names}", TypeError)


def check_same_device(anchor_name: str, anchor: Tensor, **others: Tensor | None) -> None:
    """Every tensor of ``others`` lies on ``anchor``'s device."""
    for name, other in others.items():
        if other is not None and other.device != anchor.device:
            fail(name, describe(other), f"a tensor on {anchor_name}'s device {anchor.device}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        fail(name, repr(value), "one of " + ", ".join(repr(c) for c in choices))


def check_positive(name: str, value: float) -> None:
    """``value`` is a number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        fail(name, repr(value), "a number above 0")


def check_positive_int(name: str, value: int) -> None:
    """``value`` is an integer above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        fail(name, repr(value), "an integer above 0")


def check_not_negative_int(name: str, value: int) -> None:
    """``value`` is an integer of at least zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        fail(name, repr(value), "an integer of at least 0")


def check_probability(name: str, value: float) -> None:
    """``value`` lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        fail(name, repr(value), "a probability in [0, 1)")


def is_readable(value: Tensor) -> bool:
    """Whether values can be read at no cost: the tensor is on the CPU and nothing compiles."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_finite_clips(
    name: str, value: Tensor, lengths: Tensor | None = None, time_axis: int = 1
) -> None:
    """No clip of ``value (B, ...)`` holds NaN or infinity; the message names the first that does.

    Reads the values, so on a GPU it waits for the device. Does nothing while compiling.

    Args:
        lengths: ``(B,)``: only that many entries of the time axis are a clip's own.
        time_axis: axis that lengths count along.
    """
    if torch.compiler.is_compiling() or value.numel() == 0:
        return
    value = value.detach()
    # A sum is finite unless a term is not (or it overflows, or the term is beyond its clip's end:
    # the second look sorts those out).
    if torch.isfinite(value.sum(dtype=torch.promote_types(value.dtype, torch.float32))):
        return
    bad = (~torch.isfinite(value)).movedim(time_axis, 1)[..., None].flatten(2).any(dim=2)  # (B, T)
    if lengths is not None:
        own = torch.arange(bad.shape[1], device=value.device) < lengths.to(value.device)[:, None]
        bad = bad & own
    clips = bad.any(dim=1).nonzero()
    if len(clips):
        found = f"NaN or infinity in clip {int(clips[0])}"
        fail(name, found, "finite samples", NonFiniteError)


def check_finite(
    name: str, value: Tensor, lengths: Tensor | None = None, time_axis: int = 1
) -> None:
    """:func:`check_finite_clips` of a CPU tensor; on another device nothing is read."""
    if value.device.type == "cpu":
        check_finite_clips(name, value, lengths, time_axis)
