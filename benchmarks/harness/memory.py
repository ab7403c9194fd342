"""Peak memory on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 1024 * 1024


def need_memory(needed: float) -> None:
    """Refuse a case that would exhaust the machine.

    Raises:
        MemoryError: fewer bytes than ``needed`` are available.
    """
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if needed > free:
        raise MemoryError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are available")


def high_water() -> int:
    """Peak resident memory of this process so far, in bytes.

    getrusage's figure would start at the parent process's peak.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def current() -> int:
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def extra_memory(build: Callable[[], Callable[[], Any]]) -> int:
    """High-water mark of ``build()()`` over what is resident once it is built, in bytes.

    Call it once, in a fresh process (:func:`in_fresh_process`): memory that an earlier run left
    resident would hide this one's.
    """
    run = build()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: return freed memory
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    before = current()
    run()
    return max(0, high_water() - before)


def gpu_memory(
    build: Callable[[], Callable[[], Any]], between: Callable[[], Any] = lambda: None
) -> int:
    """Peak memory of the second ``build()()`` on the GPU over the memory held before, in bytes.
    The first compiles and fills caches. ``between`` frees what the first left, such as gradients.
    """
    run = build()
    run()
    between()
    gc.collect()
    return peak_memory(run)


def peak_memory(run: Callable[[], Any]) -> int:
    """Peak memory of a call on the GPU over the memory held before, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
