"""Surveys the machine before anything is timed: its equipment, and the stages that can run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
from pathlib import Path

import torch

from musiclm_fast import _extension
from musiclm_fast.ops import _triton_target

OLDEST_TRITON = (3, 6)
PEERS = ("flash_attn", "flash_attn_interface", "xformers", "cuequivariance_ops_torch", "cudnn",
         "nnAudio", "flashmel")  # fmt: skip
SPACE = 512 << 20  # bytes: traces, profiles, the Triton cache
TRITON = ("attention", "contrastive", "flex", "step", "step_captured", "step_compiled")


@dataclasses.dataclass
class Survey:
    """The result.

    Args:
        device: the GPU and its driver in words; empty without one.
        problem: why no stage can run on a GPU here; empty if one can.
        remarks: what is missing and the consequence, one line each.
        left_out: stages that cannot run, with the reason.
    """

    device: str = ""
    problem: str = ""
    remarks: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)


def survey() -> Survey:
    """Look at the GPU, the packages and the tools; starts CUDA in this process."""
    found = Survey()
    found.problem = no_gpu()
    reason = no_triton()
    if not found.problem:
        properties = torch.cuda.get_device_properties(0)
        reason = reason or _triton_target.target_refusal(f"sm_{properties.major}{properties.minor}")
        found.device = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    if reason:
        found.left_out = dict.fromkeys(TRITON, reason)
    if found.device:
        found.remarks += missing_tools()
    return found


def no_gpu() -> str:
    """Why torch has no CUDA device here; empty if it has one."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    try:
        torch.cuda.init()
        torch.empty(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        # It names the version of a driver that is too old.
        text = " ".join(str(error).split())
        driver = driver_version()
        with_driver = f" (driver {driver})" if driver else ""
        return f"torch {torch.__version__} finds no usable GPU{with_driver}: {text[:300]}"
    return ""


def driver_version() -> str:
    """Version of NVIDIA's kernel module; empty without one."""
    path = Path("/proc/driver/nvidia/version")
    text = path.read_text() if path.exists() else ""
    match = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", text)
    return match[1] if match else ""


def no_triton() -> str:
    """Why Triton's kernels cannot run; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if os.environ.get("TRITON_INTERPRET", "0") != "1" and compiler() is None and not launchers():
        return "no C compiler (cc, gcc or clang), with which Triton builds its launchers"
    return ""


def launchers() -> bool:
    """Whether Triton's cache has some, made ahead of time: then no compiler may be needed."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    return cache is not None and any(Path(cache).glob("*/*.so"))


def compiler() -> str | None:
    """The compiler that Triton would use: CC, or one on PATH."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    return next((path for name in names if (path := shutil.which(name))), None)


def missing_tools() -> list[str]:
    """Missing tools and packages that some stages would use."""
    lines = []
    facts = _extension.extension_status().facts
    if not facts.get("cuda_archs"):
        build = [name for name in ("nvcc", "cmake", "ninja") if shutil.which(name) is None]
        how = f"and cannot be built: no {', '.join(build)}" if build else "and is built first"
        follows = "; the spectrogram's kernels are then left out" if build else ""
        lines.append(f"no compiled library with CUDA kernels, {how}{follows}")
    for tool, stage in (("ncu", "counters"), ("compute-sanitizer", "sanitizer")):
        if shutil.which(tool) is None:
            lines.append(f"no {tool}: stage {stage} has nothing to say")
    for package, what in (
        ("musiclm-pytorch", "upstream's step"),
        ("audiolm-pytorch", "upstream's generation"),
        ("torchaudio", "its spectrogram"),
        ("siglip-kernel", "its loss"), ("inf-cl", "its loss"), ("memeff", "its loss"),
    ):  # fmt: skip
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"no {package}: {what} is left out")
    absent = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if absent:
        lines.append(f"stage peers lacks what is not installed: {', '.join(absent)}")
    return lines


def no_space(folder: Path) -> str:
    """Why results cannot be written there; empty if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".space"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    free = shutil.disk_usage(folder).free
    if free < SPACE:
        return f"{folder} has {free >> 20} MiB free, of {SPACE >> 20} that a run may need"
    return ""
