"""Whether a backend may run an op's calls on a device: its self-check's result, kept per dtype."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping

import torch

# Compares a kernel with the reference on a device in a dtype: None, or the difference. Any other
# problem is raised.
SelfCheck = Callable[[torch.device, torch.dtype], str | None]


def in_default_modes(check: SelfCheck) -> SelfCheck:
    """The check with gradients enabled and autocast disabled, whatever its caller's modes."""

    @functools.wraps(check)
    def run(device: torch.device, dtype: torch.dtype) -> str | None:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            return check(device, dtype)

    return run


class SelfChecks:
    """The self-checks of one op's backends, each run at the first call that needs its result.

    - One thread checks while others wait. The check's own thread may call the op meanwhile.
    - A wrong number is final: the kernel is not used in this process.
    - Any other error (out of memory, a missing compiler) refuses the kernel for this call. The
      check is tried again at the 10th, 100th, 1,000th, ... call that it keeps from the kernel, so
      what is permanent costs few attempts; never in a backward pass, where activation checkpointing
      needs the kernel of the forward.
    - Nothing is checked while a CUDA graph is captured: what is unchecked is refused until a call
      outside the capture.

    Each refusal warns once. ``torch.compile`` keeps the answer that it got while tracing.
    """

    def __init__(self, op: str, checks: Mapping[str, SelfCheck | None]) -> None:
        self._op = op
        self._checks = checks
        self._lock = threading.RLock()
        self._results: dict[tuple[str, str, str], str] = {}
        self._errors: dict[tuple[str, str, str], tuple[int, str]] = {}  # calls refused so far, why
        self._running: set[tuple[str, str, str]] = set()
        self._warned: set[str] = set()

    def refusal(self, backend: str, device: str, dtype: str) -> str:
        """Why a backend may not run this call; empty if it may.

        Args:
            backend: its name; it has a self-check.
            device: such as ``cuda:1``; ``cuda`` is the current one.
            dtype: such as ``torch.float32``.
        """
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        key = (backend, device, dtype)
        result = self._results.get(key)
        if result is not None:
            return result
        kernel = f"{self._op} on {device} in {dtype} does not use its {backend} kernel"
        if device.startswith("cuda") and torch.cuda.is_current_stream_capturing():
            reason = "no self-check runs during a graph's capture; run the op once before it"
            return self._warned_once(kernel, reason)
        with self._lock:
            if key in self._results:
                return self._results[key]
            if key in self._running:
                return ""  # the check itself calls the op
            calls, reason = self._errors.get(key, (0, ""))
            if calls and torch._C._current_graph_task_id() != -1:  # in a backward pass
                return reason
            calls += 1
            if str(calls).strip("0") != "1":
                self._errors[key] = calls, reason
                return reason
            check = self._checks[backend]
            assert check is not None
            self._running.add(key)
            try:
                problem = check(torch.device(device), getattr(torch, dtype.removeprefix("torch.")))
            except Exception as error:
                named = f"{type(error).__name__}: {error}"
                reason = f"its self-check could not run and is tried again later ({named})"
                self._errors[key] = calls, reason
            else:
                reason = "" if problem is None else f"its self-check failed: {problem}"
                self._results[key] = reason
            finally:
                self._running.discard(key)
        return self._warned_once(kernel, reason) if reason else ""

    def _warned_once(self, kernel: str, reason: str) -> str:
        text = f"musiclm_fast: {kernel}: {reason}"
        if text not in self._warned:
            self._warned.add(text)
            # At the line that calls the op: then come the op, select, and three more down to here.
            warnings.warn(text, RuntimeWarning, stacklevel=6)
        return reason
