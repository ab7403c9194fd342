"""Builds the compiled library with CMake where that is possible; all metadata is in pyproject.toml.

MUSICLM_FAST_BUILD=auto|0|1  compiled library: where torch and the tools are there, never, or always
MUSICLM_FAST_CUDA=auto|0|1   CUDA kernels in it: where torch is a CUDA build and nvcc is there, ...
MUSICLM_FAST_CUDA_ARCHS      the GPUs that they are compiled for, as CMake names them: 80-real;90
MAX_JOBS                     compiler processes
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Read by musiclm_fast/_extension.py: pip hides what is printed here.
WHY_NOT = "musiclm_fast/why_not_built.txt"
OLDEST_TORCH = (2, 11)
HOW = "for compiled kernels: pip install . where torch and a C++ compiler are installed"


def setting(name: str, default: str, pattern: str, expected: str) -> str:
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        sys.exit(f"{name}: got {value!r}, expected {expected}")
    return value


def tool(name: str) -> str | None:
    """Path of a build tool, beside this Python (a venv that is not activated) or on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def find_torch() -> Path | None:
    """torch's folder: this process's or, where pip isolates it, that of the environment around."""
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        return None if spec.origin is None else Path(spec.origin).parent
    code = "import importlib.util as u; print(getattr(u.find_spec('torch'), 'origin', None) or '')"
    hidden_by = ("PYTHONPATH", "PYTHONNOUSERSITE")  # all that pip isolates a build with
    environment = {name: value for name, value in os.environ.items() if name not in hidden_by}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return Path(done.stdout.strip()).parent if done.stdout.strip() else None


def read_me() -> str:
    """README.md for an index, where a path leads nowhere: below the repository, or text alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository = project.get("urls", {}).get("Repository")
    link = rf"[\1]({repository}/blob/main/\2)" if repository else r"\1"
    return re.sub(r"\[([^]]+)\]\((?!https?:)([^)]+)\)", link, (ROOT / "README.md").read_text())


def why_not() -> str | None:
    """Why the compiled library cannot be built here; None if it can."""
    if sys.platform != "linux":
        return f"the compiled library is for Linux, this is {sys.platform}"
    if torch is None:
        return "torch is not installed here"
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text())
    if found and (int(found[2]), int(found[3])) < OLDEST_TORCH:
        return f"torch {found[1]} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    missing = [name for name in ("cmake", "ninja") if tool(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found (pip install {' '.join(missing)})"
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name.split()[0]) for name in compilers):
        return f"no C++ compiler found ({', '.join(compilers)})"
    return None


def note(reason: str) -> None:
    print(f"musiclm_fast: building without compiled kernels: {reason}; {HOW}", file=sys.stderr)


class BuildOps(build_ext):
    """Runs CMake in build/ and installs the ops library into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # no Python module: no tag of a Python

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)  # not an earlier build's, should this one fail
        failure = self.run_cmake(library.parent)
        if failure is None:
            return
        if required or by_name:
            sys.exit(f"musiclm_fast: {failure}; MUSICLM_FAST_BUILD=0 installs without kernels")
        global reason
        reason = failure
        note(reason)
        self.extensions = self.distribution.ext_modules = []

    def run_cmake(self, package: Path) -> str | None:
        """Configure, build and install; None, or in one line what failed."""
        # The tools of pip's isolation are gone after it: not the folder of `build_ext --inplace`.
        build = ROOT / "build" / ("cmake" if by_name else "cmake-pip")
        configure = [
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMUSICLM_FAST_CUDA={cuda}",
            f"-DMUSICLM_FAST_CUDA_ARCHS={cuda_archs}",
            f"-DMUSICLM_FAST_TORCH={torch}",
            f"-DMUSICLM_FAST_VERSION={self.distribution.get_version()}",
        ]
        jobs = ["--parallel", max_jobs] if max_jobs else []
        for arguments in (
            configure,
            ["--build", str(build), *jobs],
            ["--install", str(build), "--prefix", str(package)],
        ):
            command = [str(tool("cmake")), *arguments]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            sys.stderr.write(done.stderr)
            if done.returncode:
                error = re.search(r"CMake Error[^\n]*:\n+((?:  [^\n]+\n)+)", done.stderr)
                said = " ".join(error[1].split()) if error else "the compiler's errors are above"
                return f"compiling failed: {said}"
        return None


class BuildPy(build_py):
    """Leaves the reason in a package that has no library."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            file = Path(self.build_lib, WHY_NOT)
            file.unlink(missing_ok=True)
            if reason:
                file.write_text(f"{reason}\n")


class Wheel(bdist_wheel):
    """The library is bound to a platform, and to no Python; without it the wheel is pure."""

    def run(self) -> None:
        if self.distribution.has_ext_modules():
            self.run_command("build_ext")
            self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


wanted = setting("MUSICLM_FAST_BUILD", "auto", "auto|0|1", "one of auto, 0, 1")
cuda = setting("MUSICLM_FAST_CUDA", "auto", "auto|0|1", "one of auto, 0, 1")
arch = r"\d+[af]?(-real|-virtual)?"
examples = "CUDA architectures as CMake names them, for example 90-real or 80-real;90"
cuda_archs = setting("MUSICLM_FAST_CUDA_ARCHS", "80-real;90", f"{arch}(;{arch})*", examples)
max_jobs = setting("MAX_JOBS", "", r"([1-9]\d*)?", "a number of compiler processes above 0")

by_name = "build_ext" in sys.argv  # `setup.py build_ext --inplace`, not pip
torch = find_torch()
required = wanted == "1" or (cuda == "1" and wanted == "auto")
reason = "MUSICLM_FAST_BUILD=0" if wanted == "0" else why_not()
if reason and required:
    sys.exit(f"MUSICLM_FAST_{'BUILD' if wanted == '1' else 'CUDA'}=1, but {reason}")
if reason:
    note(reason)

setup(
    long_description=read_me(),
    long_description_content_type="text/markdown",
    ext_modules=[] if reason else [Extension("musiclm_fast.libmusiclm_fast_ops", sources=[])],
    cmdclass={"build_ext": BuildOps, "build_py": BuildPy, "bdist_wheel": Wheel},
)
