"""What the Triton backends share: target, refusals, launching, registration.

Importing this file needs neither Triton nor a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._compiling import assume_constant_result
from musiclm_fast._dispatch import Backend, Supports
from musiclm_fast._self_check import SelfCheck

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# AMD architectures for which tests/ops/triton_resources.py compiles the kernels.
AMD_TARGETS = ("gfx90a", "gfx942")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# numpy has no bfloat16, so the interpreter multiplies its bits; the tests correct that.
INTERPRETED_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_library = torch.library.Library("musiclm_fast", "FRAGMENT")

Record = Callable[[Any, int, dict[str, Any], dict[str, int]], None]
_recorder: ContextVar[tuple[Record, str] | None] = ContextVar("recorder", default=None)
# What launch() keeps, and how many of them.
_launchers: dict[tuple[Any, ...], Callable[..., None]] = {}
MOST_LAUNCHERS = 4096


def target(device: torch.device) -> str:
    """The architecture to choose tiles for: ``sm_90``, ``gfx942``, ..."""
    recorder = _recorder.get()
    return _target_of(device) if recorder is None else recorder[1]


@assume_constant_result
def _target_of(device: torch.device) -> str:
    return _architecture(device)


@functools.cache  # a tensor's device has its number
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:  # there, too, torch calls the device "cuda"
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]  # without features such as sramecc+
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def family(target: str) -> str:
    """A target's kind of matrix products: ``ampere``, ``hopper``, ``blackwell`` or ``amd``."""
    if target.startswith("gfx"):
        return "amd"
    generation = int(target.removeprefix("sm_")) // 10
    # Desktop Blackwell, sm_120, has Ampere's matrix products and less shared memory.
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(generation, "ampere")


def refusal(x: Tensor) -> str:
    """Why the kernels do not take a tensor of this device and dtype; empty if they do."""
    if x.is_cpu:
        if not INTERPRET:
            return "its kernels run on CUDA tensors (on CPU only with TRITON_INTERPRET=1)"
        if x.dtype not in INTERPRETED_DTYPES:
            return f"the interpreter runs float32 and float16, not {x.dtype}"
    elif not x.is_cuda:
        return f"no kernel for {x.device.type} tensors"
    elif (reason := target_refusal(_target_of(x.device))) != "":
        return reason
    if x.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    return ""


def supports(x: Tensor, widest: int, **others: Tensor | None) -> tuple[bool, str]:
    """Whether kernels for rows of at most ``widest`` numbers take a call, and why not.

    Device, dtype and the last size of ``x`` decide, and the dtypes of further tensors by argument.
    """
    reason = refusal(x)
    if not reason and not 0 < x.shape[-1] <= widest:
        reason = f"{x.shape[-1]} numbers a row, not 1 to {widest}"
    for name, other in others.items():
        if not reason and other is not None and other.dtype not in DTYPES:
            reason = f"it takes float32, bfloat16 and float16, and {name} is {other.dtype}"
    return not reason, reason


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels take on a device."""
    return tuple(d for d in DTYPES if not refusal(torch.empty(0, dtype=d, device=device)))


def target_refusal(target: str) -> str:
    """Why the kernels do not run on an architecture; empty if they do."""
    if family(target) == "amd":
        known = " and ".join(AMD_TARGETS)
        return "" if target in AMD_TARGETS else f"its tiles are chosen for {known}, not {target}"
    capability = int(target.removeprefix("sm_"))
    # 8.0 brought bfloat16 products and asynchronous copies.
    below = f"compute capability {capability / 10} is below 8.0"
    return below if capability < 80 else ""


def available() -> tuple[bool, str]:
    """Whether Triton is installed, and why not; does not import it."""
    return _HAVE_TRITON, "" if _HAVE_TRITON else "triton is not installed"


def triton_backend(supports: Supports, run: Callable[..., Any], self_check: SelfCheck) -> Backend:
    """The backend of an op's Triton kernels."""
    return Backend("triton", supports, run, available, self_check, dtypes)


def define(name: str, schema: str, function: Callable[..., Any]) -> None:
    """Register ``musiclm_fast::<name>``, an op whose kernels Triton compiles."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU") if INTERPRET else ("CUDA",):
        _library.impl(name, function, key)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    # Without a limit NVIDIA's assembler may target more programs per multiprocessor and spill a few
    # registers for that, or target fewer programs than fit. AMD's compiler takes no limit.
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """For :func:`launch`."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, **limit)


def launch(
    kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, int]
) -> Callable[..., None] | None:
    """Run that many programs of a kernel.

    Triton takes tens of microseconds to find what it compiled for such arguments, so that is kept:
    for the same numbers, and tensors alike in all that Triton specialises on.

    Returns:
        What launches the same programs from all arguments in the kernel's order, for as long as
        only the tensors' addresses change, by multiples of 16; None where nothing is kept.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder[0](kernel, programs, arguments, options)
        return None
    if not programs:
        return None
    # Newer Triton versions no longer fuse multiply-adds by default.
    options = options | {"enable_fp_fusion": True}
    if INTERPRET or torch.version.hip is not None:  # for AMD it specialises on memory sizes, too
        kernel[(programs,)](**arguments, **options)
        return None
    values = arguments.values()
    key = (
        id(kernel), programs, next(x for x in values if isinstance(x, Tensor)).get_device(),
        *options.items(),
        *[(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x for x in values],
    )  # fmt: skip
    run = _launchers.get(key)
    if run is not None:
        run(*map(arguments.__getitem__, kernel.arg_names))
        return run
    compiled = kernel[(programs,)](**arguments, **options)
    from triton.compiler import CompiledKernel

    if not isinstance(compiled, CompiledKernel):  # it is being compiled in another thread
        return None
    if len(_launchers) >= MOST_LAUNCHERS:
        _launchers.clear()
    run = _launchers[key] = compiled[(programs, 1, 1)]
    return run


def recording() -> bool:
    """Whether launches are recorded: tensors may have no memory."""
    return _recorder.get() is not None


@contextlib.contextmanager
def recorded_launches(record: Record, target: str) -> Iterator[None]:
    """Record every launch of a block instead of running it, for ahead-of-time compilation.

    Args:
        record: called with ``(kernel, programs, arguments, options)`` of each launch.
        target: the architecture to choose tiles for; tensors may be on the meta device.
    """
    token = _recorder.set((record, target))
    try:
        yield
    finally:
        _recorder.reset(token)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device current if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
