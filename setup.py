"""Builds the compiled library with CMake where that is possible; all metadata is in pyproject.toml.

MUSICLM_FAST_BUILD=auto|0|1  compiled library: where torch and the tools are there, never, or always
MUSICLM_FAST_CUDA=auto|0|1   CUDA kernels in it: where torch is a CUDA build and nvcc is there, ...
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPS = "musiclm_fast/libmusiclm_fast_ops.so"
OLDEST_TORCH = (2, 11)
HOW = "for compiled kernels: pip install cmake ninja pybind11 && pip install --no-build-isolation ."


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name}: got {value!r}, expected one of auto, 0, 1")
    return value


def tool(name: str) -> str | None:
    """Path of a build tool, beside this Python (a venv that is not activated) or on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def why_not() -> str | None:
    """Why the compiled library cannot be built here; None if it can."""
    if sys.platform != "linux":
        return f"the compiled library is for Linux, this is {sys.platform}"
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "torch is not importable here (pip builds in isolation by default)"
    version_file = Path(torch.origin).with_name("version.py").read_text()
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", version_file)
    if found and (int(found[2]), int(found[3])) < OLDEST_TORCH:
        return f"torch {found[1]} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    missing = [name for name in ("cmake", "ninja") if tool(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler found"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (python3-dev)"
    return None


class CMakeBuild(build_ext):
    """Runs CMake in build/ and installs both libraries, _C and the ops, into the package."""

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMUSICLM_FAST_CUDA={cuda}",
            f"-DMUSICLM_FAST_VERSION={self.distribution.get_version()}",
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        for arguments in (
            configure,
            ["--build", str(build), *jobs],
            ["--install", str(build), "--prefix", str(package)],
        ):
            if subprocess.run([str(tool("cmake")), *arguments]).returncode:
                sys.exit(
                    "musiclm_fast: compiling failed (see above); "
                    "MUSICLM_FAST_BUILD=0 installs without compiled kernels"
                )

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.copy_file(Path(self.build_lib, OPS), ROOT / OPS)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, OPS))]


wanted, cuda = switch("MUSICLM_FAST_BUILD"), switch("MUSICLM_FAST_CUDA")
reason = "MUSICLM_FAST_BUILD=0" if wanted == "0" else why_not()
if reason and wanted == "1":
    sys.exit(f"MUSICLM_FAST_BUILD=1, but {reason}")
if reason:
    print(f"musiclm_fast: building without compiled kernels: {reason}; {HOW}", file=sys.stderr)

setup(
    ext_modules=[] if reason else [Extension("musiclm_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
