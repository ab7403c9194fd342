"""Hints for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """``torch.compiler.assume_constant_result``, whose call would import the compiler: 4 s."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
