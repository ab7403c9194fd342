"""Compiles the spectrogram's CUDA file and tabulates what its kernels need; no GPU takes part."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.predict.disassembly import counts, instructions
from benchmarks.predict.launches import cuda_usage, cuobjdump

ROOT = Path(__file__).parents[2]


def nvcc() -> str | None:
    """Where the compiler is, if it is there."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@dataclass(frozen=True)
class Kernel:
    """A kernel of a benchmark's call.

    Args:
        n_fft: of the call; warps: of a block; frames: that a block makes, or whose gradient it
            takes.
        turns: of each loop in a block, in the loops' order; empty if nobody has counted them.
    """

    n_fft: int
    warps: int
    frames: int
    turns: tuple[float, ...] = ()


# Those of 24 of 128 and 400 of 512 samples by the beginnings of their names, without the template's
# later arguments. A backward's block makes 4,096 or 2,560 samples.
USUAL = {
    "forward_folded_kernel<14, 1, 1": Kernel(128, 4, 256),
    "backward_folded_kernel<14, 1": Kernel(128, 4, 125),
    "forward_fixed_kernel<256, 1": Kernel(512, 4, 64),
    "backward_fft_kernel<256, 1": Kernel(512, 4, 28),
}


def version() -> str:
    """``13.0``, of nvcc."""
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def spectrogram_usage(target: str, folder: Path) -> dict[str, dict[str, int]]:
    """By kernel, ``forward_fixed_kernel<512, 2>``: registers, bytes of stack (``REG``, ``STACK``)
    and, as in ``benchmarks.predict.disassembly``, its instructions by kind."""
    binary = compile_spectrogram(target, folder)
    usage = cuda_usage(binary)
    # "Function : <name>", then its instructions
    parts = re.split(r"\s+Function : (\S+)", cuobjdump(binary, "--dump-sass"))[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        usage[name] |= counts(instructions(text))
    return {readable(name): values for name, values in usage.items()}


def compile_spectrogram(target: str, folder: Path) -> bytes:
    """The object file.

    Args:
        target: ``sm_90``.
        folder: for the file.
    """
    include = Path(torch.__file__).parent / "include"
    arch = target.removeprefix("sm_")
    found = folder / f"spectrogram_{target}.o"
    command = [
        nvcc(), "-std=c++20", "-O2", "-Icsrc", "-isystem", str(include), "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "--expt-relaxed-constexpr",
        "--expt-extended-lambda", f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-c", "csrc/spectrogram/spectrogram.cu", "-o", str(found),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return found.read_bytes()


def readable(symbol: str) -> str:
    """A kernel's name with its template's numbers."""
    match = re.search(r"\d+([a-z_]+_kernel)(?:I((?:L[ib]\d+E)+)E)?", symbol)
    assert match is not None, symbol
    numbers = re.findall(r"L[ib](\d+)E", match[2] or "")
    return match[1] + (f"<{', '.join(numbers)}>" if numbers else "")
