"""What the Triton backends share: target, refusals, launching, registration.

Importing this file needs neither Triton nor a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musiclm_fast._compiling import assume_constant_result

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# AMD architectures for which tests/ops/triton_resources.py compiles the kernels.
AMD_TARGETS = ("gfx90a", "gfx942")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# numpy has no bfloat16: the interpreter multiplies its bits. The tests mend that.
INTERPRETED_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_library = torch.library.Library("musiclm_fast", "FRAGMENT")

Record = Callable[[Any, int, dict[str, Any], dict[str, int]], None]
_recorder: ContextVar[tuple[Record, str] | None] = ContextVar("recorder", default=None)


def target(device: torch.device) -> str:
    """The architecture to choose tiles for: ``sm_90``, ``gfx942``, ..."""
    recorder = _recorder.get()
    return _target_of(device) if recorder is None else recorder[1]


@assume_constant_result
def _target_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:  # there, too, torch calls the device "cuda"
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]  # without features such as sramecc+
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def family(target: str) -> str:
    """Targets whose products work alike: ``ampere``, ``hopper``, ``blackwell`` or ``amd``."""
    if target.startswith("gfx"):
        return "amd"
    generation = int(target.removeprefix("sm_")) // 10
    # The desktop's Blackwell, sm_120, has Ampere's products and less shared memory.
    return {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(generation, "ampere")


def refusal(x: Tensor) -> str:
    """Why no kernel takes a tensor like this, from device and dtype alone; empty if one does."""
    if x.device.type == "cpu":
        if not INTERPRET:
            return "its kernels run on CUDA tensors (on CPU only with TRITON_INTERPRET=1)"
        if x.dtype not in INTERPRETED_DTYPES:
            return f"the interpreter runs float32 and float16, not {x.dtype}"
    elif x.device.type != "cuda":
        return f"no kernel for {x.device.type} tensors"
    elif (reason := target_refusal(_target_of(x.device))) != "":
        return reason
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is none of float32, bfloat16 and float16"
    return ""


def supports(x: Tensor, widest: int) -> tuple[bool, str]:
    """Whether kernels for rows of at most ``widest`` numbers take a call, and why not.

    Device, dtype and the last size of ``x`` decide.
    """
    reason = refusal(x)
    if not reason and not 0 < x.shape[-1] <= widest:
        reason = f"{x.shape[-1]} numbers a row, not 1 to {widest}"
    return not reason, reason


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Those that the kernels take on a device."""
    return tuple(d for d in DTYPES if not refusal(torch.empty(0, dtype=d, device=device)))


def target_refusal(target: str) -> str:
    """Why no kernel runs on an architecture; empty if they do."""
    if family(target) == "amd":
        known = " and ".join(AMD_TARGETS)
        return "" if target in AMD_TARGETS else f"its tiles are chosen for {known}, not {target}"
    capability = int(target.removeprefix("sm_"))
    # bfloat16 products and asynchronous copies
    below = f"compute capability {capability / 10} is below 8.0"
    return below if capability < 80 else ""


def available() -> tuple[bool, str]:
    """Whether Triton is installed; does not import it."""
    return _HAVE_TRITON, "" if _HAVE_TRITON else "triton is not installed"


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
    # NVIDIA's assembler may aim at more programs a multiprocessor and miss by a few registers,
    # which it spills, or at fewer: a limit makes it use just as many.
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """For :func:`launch`."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, **limit)


def launch(kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, int]) -> None:
    """Run that many programs of a kernel."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder[0](kernel, programs, arguments, options)
    elif programs:
        # Fused multiply-adds by order: newer Triton versions no longer default to them.
        kernel[(programs,)](**arguments, **options, enable_fp_fusion=True)


@contextlib.contextmanager
def recorded_launches(record: Record, target: str) -> Iterator[None]:
    """For the ahead-of-time checks: note every launch of a block instead of running it.

    Args:
        record: gets ``(kernel, programs, arguments, options)`` of each launch.
        target: the architecture for which tiles are chosen; the tensors may be on the meta
            device.
    """
    token = _recorder.set((record, target))
    try:
        yield
    finally:
        _recorder.reset(token)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """That device made current, where it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
