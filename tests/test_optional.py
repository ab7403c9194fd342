"""Optional packages: every extra is used and documented, a missing one costs one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from musiclm_fast._optional import PACKAGES, missing, require

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    extra: [re.split(r"[<>=]", requirement)[0] for requirement in requirements]
    for extra, requirements in PROJECT["optional-dependencies"].items()
}
CORE = [re.split(r"[<>=]", requirement)[0] for requirement in PROJECT["dependencies"]]
USED = sorted({*CORE, *(p for e in EXTRAS if e not in ("bench", "dev") for p in EXTRAS[e])})

# Hides packages from a process, which then runs code.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
"""


def without(hidden: list[str], code: str) -> list[str]:
    """The lines that ``code`` prints, to either stream, in a process without some packages."""
    done = subprocess.run(
        [sys.executable, "-c", f"{HIDE.format(hidden=hidden)}\n{code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", PACKAGES)
def test_the_extra_that_is_named_has_the_package(name: str) -> None:
    _, package, extra = PACKAGES[name]
    assert package in EXTRAS[extra]


@pytest.mark.parametrize("package", USED)
def test_every_dependency_is_used(package: str) -> None:
    name = next((n for n, (_, p, _) in PACKAGES.items() if p == package), package)
    name = name.replace("-", "_")
    uses = rf'(^\s*(import|from) {name}\b)|require\("{name}"\)|find_spec\("{name}"\)'
    files = (ROOT / "musiclm_fast").rglob("*.py")
    assert any(re.search(uses, file.read_text(), re.MULTILINE) for file in files)


def test_every_extra_is_in_the_readme() -> None:
    table = (ROOT / "README.md").read_text().split("| extra |")[1].split("\n\n")[0]
    for extra, packages in EXTRAS.items():
        assert f"`{extra}`" in table
        if extra not in ("bench", "dev"):
            (row,) = (line for line in table.splitlines() if line.startswith(f"| `{extra}` |"))
            assert row.strip("| ").split("|")[-1].strip().split(", ") == packages


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, package, extra = PACKAGES[name]
    monkeypatch.setitem(sys.modules, name, None)  # as Python marks what must not be imported
    with pytest.raises(ImportError) as raised:
        require(name)
    how = f"pip install {package}, or in a checkout pip install '.[{extra}]'"
    assert str(raised.value) == f"{what} needs {package}, which is not installed: {how}"


def test_a_broken_package_is_not_called_missing() -> None:
    error = missing("accelerate", ImportError("cannot import name 'x'"))
    assert "accelerate, which does not import (cannot import name 'x'): pip" in str(error)


def test_names_of_the_package_without_extras() -> None:
    code = (
        "import musiclm_fast\n"
        "for name in musiclm_fast.__all__:\n"
        "    try: getattr(musiclm_fast, name)\n"
        "    except ImportError as error: print(name, error)"
    )
    (line,) = without(list(PACKAGES), code)
    assert line.startswith("MuLaNTrainer training needs accelerate, which is not installed: pip")


def test_commands_without_extras(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").touch()
    commands = {
        "data check sounds": "soundfile",
        "data titles sounds": "soundfile",
        "data convert sounds out": "soundfile",
        "demo --output demo": "accelerate",
        "demo-music --output music": "accelerate",
        "train mulan --set training.steps=1": "pyyaml",
        "train semantic sounds": "pyyaml",
        "generate piano": "soundfile",
    }
    code = (
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "from musiclm_fast.cli import main\n"
        f"for command in {list(commands)!r}: main(command.split())"
    )
    said = without(list(PACKAGES), code)
    assert len(said) == len(commands), said
    for line, (command, package) in zip(said, commands.items(), strict=True):
        words = command.partition(" s")[0].partition(" -")[0].removesuffix(" piano")
        assert line.startswith(f"musiclm-fast {words}"), line
        assert f"needs {package}, which is not installed: pip install {package}, or" in line
