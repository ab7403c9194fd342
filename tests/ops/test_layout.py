"""Every op has the same files, by one stem, and its README names the backends that it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import musiclm_fast.ops  # noqa: F401  registers the dispatchers
from musiclm_fast._dispatch import dispatchers

ROOT = Path(__file__).resolve().parents[2]


def ops(root: Path) -> list[str]:
    folders = (path for path in (root / "musiclm_fast" / "ops").iterdir() if path.is_dir())
    return sorted(path.name for path in folders if path.name[0] not in "_.")


def backends(readme: Path) -> list[str]:
    """The first column of the README's table of backends."""
    if not readme.is_file():
        return []
    table = re.search(r"^\| backend \|.*\n(?:\|.*\n)+", readme.read_text(), re.MULTILINE)
    return re.findall(r"^\| `(\w+)` \|", table[0], re.MULTILINE) if table else []


def missing(root: Path, op: str) -> list[str]:
    """What the op lacks: patterns of paths below the root that match nothing."""
    folder = f"musiclm_fast/ops/{op}"
    named = backends(root / folder / "README.md")
    wanted = {
        f"{folder}/op.py",
        f"{folder}/reference.py",
        f"{folder}/README.md",
        f"tests/ops/test_{op}.py",
        f"benchmarks/**/bench_{op}*.py",
        *(f"{folder}/_{name}.py" for name in named if name != "torch"),
    }
    gone = [path for path in sorted(wanted) if not list(root.glob(path))]
    if not any((root / path).is_file() for path in kernels(op)):
        gone.append(" or ".join(kernels(op)))
    if "torch" not in named:
        gone.append("a table of backends")
    return gone


def kernels(op: str) -> tuple[str, str]:
    return f"csrc/{op}/{op}.cpp", f"musiclm_fast/ops/{op}/_triton.py"


def test_there_are_ops() -> None:
    assert set(dispatchers()) == set(ops(ROOT))


@pytest.mark.parametrize("op", ops(ROOT))
def test_every_file_is_there(op: str) -> None:
    assert not missing(ROOT, op)


@pytest.mark.parametrize("op", ops(ROOT))
def test_readme_names_the_backends_in_their_order(op: str) -> None:
    readme = ROOT / "musiclm_fast" / "ops" / op / "README.md"
    assert backends(readme) == list(dispatchers()[op].names())


def test_csrc_folders_are_ops() -> None:
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common"}
    assert folders <= set(ops(ROOT))


@pytest.mark.parametrize(
    "lost",
    [
        "musiclm_fast/ops/op/op.py",
        "musiclm_fast/ops/op/reference.py",
        "musiclm_fast/ops/op/_cpp.py",
        "csrc/op/op.cpp",
        "tests/ops/test_op.py",
        "benchmarks/bench_op_gpu.py",
    ],
)
def test_a_lost_file_is_missing(lost: str, tmp_path: Path) -> None:
    files = [
        *(f"musiclm_fast/ops/op/{name}" for name in ("op.py", "reference.py", "_cpp.py")),
        "csrc/op/op.cpp", "tests/ops/test_op.py", "benchmarks/bench_op_gpu.py",
    ]  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    readme = tmp_path / "musiclm_fast/ops/op/README.md"
    readme.write_text("| backend | runs |\n|---|---|\n| `cpp` | CPU |\n| `torch` | all |\n")
    assert not missing(tmp_path, "op")
    (tmp_path / lost).unlink()
    (gone,) = missing(tmp_path, "op")
    assert lost in gone.replace("**/", "").replace("*", "_gpu").split(" or ")
    readme.unlink()
    assert {"musiclm_fast/ops/op/README.md", "a table of backends"} <= set(missing(tmp_path, "op"))
