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
    """For what would take the machine down.

    Raises:
        MemoryError: fewer bytes than ``needed`` are available.
    """
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if needed > free:
        raise MemoryError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are available")


def high_water() -> int:
    """Peak resident memory of this process so far, in bytes.

    Of its own memory: getrusage's figure starts at that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def current() -> int:
    """Resident memory of this process now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def extra_memory(build: Callable[[], Callable[[], Any]]) -> int:
    """High-water mark of ``build()()`` over what is resident once it is built, in bytes.

    Call it once, in a fresh process (:func:`in_fresh_process`): what an earlier run left resident
    would hide what this one needs.
    """
    run = build()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc: what was freed is resident no more
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = current()
    run()
    return max(0, high_water() - before)


def gpu_memory(
    build: Callable[[], Callable[[], Any]], between: Callable[[], Any] = lambda: None
) -> int:
    """Peak memory of the second ``build()()`` on the GPU over what is held before, in bytes: the
    first compiles and fills caches. ``between`` lets go of what the first left, such as gradients.
    """
    run = build()
    run()
    between()
    gc.collect()
    return peak_memory(run)


def peak_memory(run: Callable[[], Any]) -> int:
    """Peak memory of a call on the GPU over what is held before, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
