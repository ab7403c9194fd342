"""Choice of backend for an op: ordered candidates, a reason for every refusal, no silent fallback.

Every op owns one :class:`Dispatcher` with its backends in the order in which they are tried. A
backend says whether it can take a call from shapes, dtypes and devices alone, so the choice
traces under ``torch.compile`` and costs no host synchronisation.

``backend=None`` takes the first backend that supports the call. Naming one, in the call, with
:func:`use_backend` or in the environment variable ``MUSICLM_FAST_BACKEND``, is binding: if that
backend cannot run the call, it raises with the reason. The variable holds one name for all ops
that have such a backend (``torch``) or pairs (``attention=torch,spectrogram=cpp``); it is read
once, at import.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from musiclm_fast import _extension
from musiclm_fast._compiling import assume_constant_result
from musiclm_fast._self_check import SelfCheck, SelfChecks

Supports = Callable[..., tuple[bool, str]]


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Args:
        name: ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.
        supports: takes the op's arguments, returns ``(True, "")`` or ``(False, reason)``.
        run: takes the same arguments, returns the op's result.
        available: ``(ok, reason)`` on this machine, whatever the arguments.
        self_check: compares the kernel with the reference and returns None or the difference; any
            other problem is raised. For kernels on devices that the authors may not have. It runs
            once per device and dtype (of the op's first floating tensor), at the first call there
            (:class:`SelfChecks` has the details), unless the backend was asked for by name.
        check_dtypes: the dtypes to check on a device.
    """

    name: str
    supports: Supports
    run: Callable[..., Any]
    available: Callable[[], tuple[bool, str]] = lambda: (True, "")
    self_check: SelfCheck | None = None
    check_dtypes: Callable[[torch.device], tuple[torch.dtype, ...]] = lambda device: ()


def torch_backend(reference: Callable[..., Any]) -> Backend:
    """An op's definition as the backend that takes every call."""
    return Backend("torch", lambda **_: (True, ""), reference)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off: a torch reference chooses its precision itself.

    The device is that of the first argument, positional or by keyword.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


class BackendError(RuntimeError):
    """A backend that was chosen by name cannot run the call."""


_dispatchers: dict[str, Dispatcher] = {}
_forced: dict[str, str] = {}

# They do not trace what torch.library registers.
_TRANSFORMED = "torch.func transforms need the torch backend"


class Dispatcher:
    """The ordered backends of one op."""

    def __init__(self, op: str, backends: Sequence[Backend]) -> None:
        self.op = op
        self.backends = tuple(backends)
        self._self_checks = SelfChecks(op, {b.name: b.self_check for b in backends})
        _dispatchers[op] = self

    def names(self) -> tuple[str, ...]:
        """The backends' names in the order in which they are tried."""
        return tuple(backend.name for backend in self.backends)

    def select(self, backend: str | None, device: torch.device, **arguments: Any) -> Backend:
        """Return the backend that runs this call.

        Args:
            backend: a name, or None for the first that supports the call.
            device: where the call's tensors lie.
            **arguments: the op's arguments.

        Raises:
            ValueError: no backend has that name.
            BackendError: the named backend cannot run this call, with its reason.
        """
        if backend is None:
            backend = _forced.get(self.op)
        if backend is not None:
            return self._named(backend, arguments)
        transformed = torch._C._are_functorch_transforms_active()
        refusals = []
        missing = ""  # why a compiled kernel that would run the call is not there
        for candidate in self.backends:
            if transformed and candidate.name != "torch":
                refusals.append(f"{candidate.name}: {_TRANSFORMED}")
                continue
            ok, reason = candidate.available()
            if not ok and candidate.name in ("cpp", "cuda") and candidate.supports(**arguments)[0]:
                missing = missing or reason
            if ok:
                ok, reason = candidate.supports(**arguments)
            if ok and candidate.self_check is not None:
                reason = _self_check_refusal(
                    self.op, candidate.name, str(device), str(_dtype(arguments))
                )
                ok = not reason
            if ok:
                if missing and candidate.name == "torch":
                    _extension.warn_of_missing_kernels(missing)
                return candidate
            refusals.append(f"{candidate.name}: {reason}")
        raise BackendError(f"{self.op}: no backend runs this call ({'; '.join(refusals)})")

    def _named(self, name: str, arguments: dict[str, Any]) -> Backend:
        for candidate in self.backends:
            if candidate.name == name:
                break
        else:
            raise ValueError(f"backend: got {name!r}, expected one of {', '.join(self.names())}")
        ok, reason = candidate.available()
        if ok and name != "torch" and torch._C._are_functorch_transforms_active():
            ok, reason = False, _TRANSFORMED
        if ok:
            ok, reason = candidate.supports(**arguments)
        if not ok:
            raise BackendError(f"{self.op}: backend {name!r} cannot run this call: {reason}")
        return candidate


@assume_constant_result
def _self_check_refusal(op: str, name: str, device: str, dtype: str) -> str:
    # Strings alone: torch.compile takes no dispatcher, device or dtype as a constant argument.
    return _dispatchers[op]._self_checks.refusal(name, device, dtype)


def _dtype(arguments: dict[str, Any]) -> torch.dtype:
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.dtype
    raise TypeError("a self-check needs a call with a floating tensor")


def dispatchers() -> dict[str, Dispatcher]:
    """All ops' dispatchers by op name."""
    return dict(_dispatchers)


@contextlib.contextmanager
def use_backend(name: str | None = None, **per_op: str) -> Iterator[None]:
    """Run the ops of a block on named backends.

    ``use_backend("torch")`` orders it for every op that has such a backend,
    ``use_backend(attention="torch")`` for one op.

    Raises:
        ValueError: unknown op, or a backend that the op does not have.
    """
    before = dict(_forced)
    _forced.update(_orders(name, per_op))
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _orders(name: str | None, per_op: dict[str, str]) -> dict[str, str]:
    orders = {}
    if name is not None:
        orders = {op: name for op, d in _dispatchers.items() if name in d.names()}
        if not orders:
            known = sorted({n for d in _dispatchers.values() for n in d.names()})
            raise ValueError(f"backend: got {name!r}, expected one of {', '.join(known)}")
    for op, backend in per_op.items():
        if op not in _dispatchers:
            raise ValueError(f"op: got {op!r}, expected one of {', '.join(_dispatchers)}")
        if backend not in _dispatchers[op].names():
            names = ", ".join(_dispatchers[op].names())
            raise ValueError(f"backend of {op}: got {backend!r}, expected one of {names}")
        orders[op] = backend
    return orders


def read_environment(value: str | None = None) -> None:
    """Apply ``MUSICLM_FAST_BACKEND`` (or ``value``); called once all ops are registered."""
    text = os.environ.get("MUSICLM_FAST_BACKEND", "") if value is None else value
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, separator, backend = part.partition("=")
        try:
            _forced.update(_orders(None, {op: backend}) if separator else _orders(part, {}))
        except ValueError as error:
            raise ValueError(f"MUSICLM_FAST_BACKEND={text!r}: {error}") from None
