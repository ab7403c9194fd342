"""The layout of the package, by its own imports: one direction, no circle, no crowded room.

Imports inside functions and under ``TYPE_CHECKING`` count too, and so do modules that are named in
a string. The two facades (``musiclm_fast`` and ``musiclm_fast.audiolm``) resolve names lazily and
stand above everything: they may name any module, and no module may import a name from them.
"""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "musiclm_fast"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the bottom to the top. A module imports from its own room and from rooms below its layer.
LAYERS = (
    {"private helpers"},  # musiclm_fast/_*.py and tokenizer.py
    {"ops", "audio", "cost"},
    {"nn", "datasets"},
    {"models", "audiolm"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"musiclm"},
    {"demo", "interop"},
    {"info", "testing"},
    {"cli"},
    {"__main__"},
)
FACADES = {PACKAGE, f"{PACKAGE}.audiolm"}
LARGEST_ROOM = 0.2  # of the package's lines
LONGEST_FILE = 450  # lines, kernels excepted


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    first = module.split(".")[1]
    if first == "tokenizer" or (first.startswith("_") and first != "__main__"):
        return "private helpers"
    return first


LEVEL = {name: level for level, rooms in enumerate(LAYERS) for name in rooms}


def named(module: str) -> Iterator[str]:
    """Every module of the package that a module names, and names that it takes from a facade."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES or base in FACADES else base
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value in MODULES
            and node.value != PACKAGE
        ):
            yield node.value


def imports() -> dict[str, set[str]]:
    return {
        module: {name for name in named(module) if name in MODULES and name != module}
        for module in MODULES
        if module not in FACADES
    }


IMPORTS = imports()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = []
            while not part or part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_every_module_has_a_room_in_the_layers():
    assert {room(module) for module in IMPORTS if module != PACKAGE} <= LEVEL.keys()


def test_there_is_no_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]
    assert circles(IMPORTS) == []


def test_no_import_runs_up():
    up = [
        f"{module} -> {other}"
        for module, others in IMPORTS.items()
        for other in sorted(others - FACADES)
        if room(module) != room(other) and LEVEL[room(other)] >= LEVEL[room(module)]
    ]
    assert up == []


@pytest.mark.parametrize("facade", sorted(FACADES))
def test_nothing_imports_from_a_facade(facade):
    inside = f"{facade}."
    taken = [
        f"{module}: {name}"
        for module in IMPORTS
        for name in named(module)
        if name == facade or (name.startswith(inside) and name.rpartition(".")[0] == facade)
        if name not in MODULES or name == facade
    ]
    assert taken == []


def test_no_room_holds_a_fifth_of_the_lines():
    # ops is a corridor of rooms, one an op
    lines: Counter[str] = Counter()
    for module, path in MODULES.items():
        parts = module.split(".")
        name = ".".join(parts[1:3]) if parts[1:2] == ["ops"] else ".".join(parts[1:2])
        lines[name] += len(path.read_text(encoding="utf-8").splitlines())
    crowded = {name: n for name, n in lines.items() if n >= LARGEST_ROOM * lines.total()}
    assert crowded == {}


def test_a_file_tells_one_thing():
    long = {
        module: count
        for module, path in MODULES.items()
        if not module.endswith("_kernels")
        and (count := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_a_module_that_has_moved_says_where_to():
    from musiclm_fast._moved import MOVED

    for old, new in MOVED.items():
        assert f"{PACKAGE}.{old}" not in MODULES
        for name in new.replace(" and ", ", ").split(", "):
            assert f"{PACKAGE}.{name}" in MODULES
        with pytest.raises(ModuleNotFoundError, match=f"is now {PACKAGE}."):
            importlib.import_module(f"{PACKAGE}.{old}")
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module(f"{PACKAGE}.nowhere")
