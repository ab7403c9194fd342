"""The compiled library: its facts, its SIMD levels, and what is said where it is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from musiclm_fast import _extension

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "musiclm_fast"
BUILD = ROOT / "build" / "cmake"

needs_library = pytest.mark.skipif(
    not _extension.load(), reason=f"needs the compiled library: {_extension.why_missing()}"
)


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def keep_level() -> Iterator[None]:
    level = _extension.simd_level()
    yield
    _extension.set_simd_level(level)


def test_library_is_built_where_it_can_be() -> None:
    """Guards against a whole suite that skips the compiled kernels unseen."""
    if os.environ.get("MUSICLM_FAST_BUILD") == "0":
        pytest.skip("MUSICLM_FAST_BUILD=0")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler")
    assert _extension.load(), _extension.why_missing()


@needs_library
def test_build_facts() -> None:
    status = _extension.extension_status()
    assert status.loaded
    assert status.reason == ""
    facts = status.facts
    assert re.match(r"\d+\.\d+\.\d+", facts["version"])
    assert re.match(r"(GNU|Clang|AppleClang|IntelLLVM) \d+", facts["compiler"])
    assert "baseline" in facts["simd_levels"]
    assert re.match(r"2\.\d+", facts["torch_built_against"])
    assert isinstance(facts["cuda_archs"], list)


@needs_library
@pytest.mark.usefixtures("keep_level")
def test_simd_level_can_be_lowered() -> None:
    best = _extension.simd_level()
    for level in _extension.extension_status().facts["simd_levels"]:
        _extension.set_simd_level(level)
        assert _extension.simd_level() == level
        assert not _extension.has_avx512_bf16() or level == "avx512"
        if level == best:
            break


@needs_library
@pytest.mark.usefixtures("keep_level")
def test_unknown_simd_level_is_refused() -> None:
    before = _extension.simd_level()
    with pytest.raises(ValueError, match="name: got 'sse9'"):
        _extension.set_simd_level("sse9")
    assert _extension.simd_level() == before


@needs_library
def test_simd_level_from_environment() -> None:
    code = "from musiclm_fast import _extension as e; print(e.simd_level())"
    assert python(code, MUSICLM_FAST_SIMD="baseline") == "baseline"


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("MUSICLM_FAST_SIMD", "one of 'baseline', 'avx2', 'avx512'"),
        ("MUSICLM_FAST_AUTOTUNE", "one of '0', '1'"),
        ("MUSICLM_FAST_BACKEND", "one of cpp, cuda, torch, triton"),
    ],
)
def test_wrong_environment_is_refused_on_import(name: str, allowed: str) -> None:
    code = "try: import musiclm_fast.ops\nexcept ValueError as error: print(error)"
    said = python(code, **{name: "avx9000"})
    assert f"{name}" in said
    assert f"got 'avx9000', expected {allowed}" in said


@needs_library
def test_library_is_on_the_stable_abi() -> None:
    """Every symbol asked of torch is one of its C functions, and only libtorch_cpu is linked."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs binutils")
    library = PACKAGE / "libmusiclm_fast_ops.so"
    command = ["nm", "--dynamic", "--undefined-only", str(library)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.search(r"N[A-Z]*K?(2at|3c10|5torch|6caffe2)", name)]
    command = ["readelf", "--dynamic", "--wide", str(library)]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert [name for name in needed if "torch" in name or "cu" in name] == ["libtorch_cpu.so"]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def package_copy(target: Path, *, library: bool) -> Path:
    target.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", *([] if library else ["*.so"]))
    shutil.copytree(PACKAGE, target / "musiclm_fast", ignore=ignore)
    return target


def test_missing_library_says_how_to_build(tmp_path: Path) -> None:
    tree = package_copy(tmp_path / "tree", library=False)
    code = (
        "import torch, musiclm_fast; from musiclm_fast import _extension as e; "
        "print(e.load(), e.simd_level(), e.why_missing())"
    )
    said = python(code, cwd=tree)
    assert said.startswith("False None the compiled library is not built; to build it: `pip inst")
    (tree / "musiclm_fast" / "why_not_built.txt").write_text("no C++ compiler found\n")
    assert "library is not built (no C++ compiler found); to" in python(code, cwd=tree)


CALLS = """
import warnings, torch
from musiclm_fast import ops
q, wav, window = torch.randn(1, 2, 5, 8), torch.randn(2, 400), torch.hann_window(64)

def both(q):
    return ops.attention(q, q, q).sum() + ops.spectrogram(wav, n_fft=64, window=window).sum()

def warned(*calls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call(q)
    return [str(w.message) for w in caught if w.category is RuntimeWarning]

compiled = torch.compile(both, fullgraph=True, backend="eager")
"""


@pytest.mark.parametrize("calls", ["both, both, compiled", "compiled, compiled, both"])
def test_missing_library_warns_once_at_the_first_call(tmp_path: Path, calls: str) -> None:
    tree = package_copy(tmp_path / "tree", library=False)
    forced = "with ops.use_backend('torch'): assert warned(both, compiled) == []"
    double = "assert warned(lambda q: ops.attention(q.double(), q.double(), q.double())) == []"
    code = f"{CALLS}\n{forced}\n{double}\nsaid = warned({calls})\nassert len(said) == 1, said\n"
    said = python(f"{code}print(*said, warned({calls}))", cwd=tree)
    assert said.startswith(
        "musiclm_fast runs without its compiled kernels: the compiled library is"
    )
    assert "`pip install .`" in said
    assert said.endswith("[]")


@needs_library
def test_no_warning_with_the_library() -> None:
    assert python(f"{CALLS}\nprint(warned(both, compiled))") == "[]"


@needs_library
def test_broken_library_is_reported_not_raised(tmp_path: Path) -> None:
    tree = package_copy(tmp_path / "tree", library=True)
    library = tree / "musiclm_fast" / "libmusiclm_fast_ops.so"
    library.write_bytes(b"not a library")
    code = "from musiclm_fast import _extension as e; print(e.load(), e.why_missing())"
    said = python(code, cwd=tree)
    assert said.startswith("False the compiled library does not load")


@needs_library
def test_older_torch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    status = _extension._load()
    assert not status.loaded
    assert status.reason == "the compiled library needs torch 2.11 or newer, this is 2.10.1+cpu"


@needs_library
def test_load_is_traced_without_a_graph_break() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _extension.load() else x - 1

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.zeros(2)), torch.ones(2))


@needs_library
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_simd_helpers(level: str) -> None:
    """The C++ checks of common/simd.h, compiled for each level and run where the processor can."""
    if level not in _extension.extension_status().facts["simd_levels"]:
        pytest.skip(f"{level} is not compiled for this processor family")
    if not (BUILD / "build.ninja").exists():
        pytest.skip("needs the build folder that `setup.py build_ext --inplace` leaves")
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    program = f"simd_test_{level}"
    command = [cmake, "--build", str(BUILD), "--target", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    supported = torch.backends.cpu.get_cpu_capability()
    if {"avx2": 1, "avx512": 2}.get(level, 0) > {"AVX2": 1, "AVX512": 2}.get(supported, 0):
        pytest.skip(f"this processor has no {level}")
    ran = subprocess.run([str(BUILD / program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("compiler", ["GNU 11.4.0", "Clang 13.0.1"])
def test_too_old_compiler_is_refused(tmp_path: Path, compiler: str) -> None:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    kind, version = compiler.split()
    facts = {"FORCED": 1, "ID_RUN": 1, "ID": kind, "VERSION": version}
    told = [f"-DCMAKE_CXX_COMPILER_{name}={value}" for name, value in facts.items()]
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *told]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert re.search(rf"{compiler} \(.*\) is too old, expected g\+\+ 12, clang 14 or newer", said)


@pytest.mark.slow
def test_cuda_build_loads_without_cuda(tmp_path: Path) -> None:
    """nvcc compiles every .cu against this torch, CPU build or not, and the result loads here."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = ["-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DMUSICLM_FAST_CUDA=1"]
    subprocess.run([cmake, *configure, f"-DPython_EXECUTABLE={sys.executable}"], check=True)
    subprocess.run([cmake, "--build", str(tmp_path)], check=True)
    # In a process of its own: this one has the package's library, and ops register only once.
    library = str(tmp_path / "libmusiclm_fast_ops.so")
    python(
        f"import ctypes, torch; ctypes.CDLL({library!r}); "
        "torch.ops.musiclm_fast.attention_forward, torch.ops.musiclm_fast.spectrogram_forward"
    )


def test_the_library_declares_the_ops_that_python_expects():
    schemas = (ROOT / "csrc" / "library.cpp").read_text()
    declared = re.findall(r'm\.def\(\s*"(\w+)\(', schemas)
    assert sorted(declared) == sorted(_extension.OPS)
