"""Configurations as nested dataclasses: read from YAML, checked, explained, written out.

A field's explanation is its line in the ``Args:`` of the class's docstring. A field whose metadata
has ``may_change`` does not determine the result of a run. Nothing here imports torch or numpy.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from musiclm_fast._optional import require

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration with an unknown field, a wrong type or a value out of range."""


def setting(
    default: Any,
    *,
    argument: str | None = None,
    may_change: bool = False,
    renamed: dict[str, str] | None = None,
) -> Any:
    """A field of a configuration.

    Args:
        default: default value.
        argument: its name as a keyword argument, if it differs.
        may_change: whether a resumed run may have another value.
        renamed: the current name of each value that files may have by an earlier name.
    """
    metadata = {"argument": argument, "may_change": may_change, "renamed": renamed or {}}
    return dataclasses.field(default=default, metadata=metadata)


def read_config(cls: type[T], file: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """A configuration from a YAML file (None: the defaults) and ``field.path=value`` overrides.

    Args:
        cls: a dataclass whose fields have defaults.
        file: YAML with the values that differ from the defaults.
        overrides: have priority over the file; their values are YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is not YAML, or a field is unknown, of a wrong type or out of range; the
            message names it.
        ImportError: pyyaml is not installed.
    """
    return from_plain(cls(), read_values(file, overrides))


def read_values(file: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Nested dictionaries from a YAML file and overrides; see :func:`read_config`."""
    values: dict[str, Any] = {}
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"config: no file {str(file)!r}")
        found = _parse(Path(file).read_text(encoding="utf-8"), f"config: {str(file)!r}")
        values = {} if found is None else found
        if not isinstance(values, dict):
            raise ConfigError(f"config: {str(file)!r} holds {_name(values)}, expected fields")
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"set: got {override!r}, expected FIELD=VALUE, as in training.steps=9"
            )
        _put(values, path.strip(), _parse(text, f"set {path.strip()}"))
    return values


def _parse(text: str, where: str) -> Any:
    yaml = require("yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is no YAML ({reason})") from error


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[last] = value


def from_plain(default: T, values: Any, path: str = "") -> T:
    """A configuration from nested dictionaries of plain values; missing fields are ``default``'s.

    Raises:
        ConfigError: a field is unknown, of a wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path.rstrip('.')}: got {_name(values)}, expected its fields")
    known = [field.name for field in dataclasses.fields(typing.cast(Any, default))]
    for name in values:
        if name not in known:
            raise ConfigError(_unknown(f"{path}{name}", [path + field for field in known]))
    changes = {n: convert_field(default, n, value, path + n) for n, value in values.items()}
    try:
        return dataclasses.replace(typing.cast(Any, default), **changes)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def convert_field(default: Any, name: str, value: Any, path: str) -> Any:
    """A plain value as a field of ``default`` holds it; ``path`` names the field in errors.

    Raises:
        ConfigError: it is of a wrong type.
    """
    hint = typing.get_type_hints(type(default))[name]
    if dataclasses.is_dataclass(hint):
        return from_plain(getattr(default, name), {} if value is None else value, f"{path}.")
    if isinstance(value, str):
        (field,) = (each for each in dataclasses.fields(default) if each.name == name)
        value = field.metadata.get("renamed", {}).get(value, value)
    return _convert(hint, value, path)


def _unknown(got: str, known: list[str]) -> str:
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    names = ", ".join(name.rpartition(".")[2] for name in known)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{got}: no such field; {hint}There are {names}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (each for each in inner if each is not type(None))
        return _convert(hint, value, path)
    if origin is typing.Literal:
        if value is False and "no" in inner:  # YAML's no
            value = "no"
        if value not in inner:
            near = difflib.get_close_matches(str(value), [str(i) for i in inner], n=1)
            hint_ = f" (did you mean {near[0]}?)" if near else ""
            choices = ", ".join(map(str, inner))
            raise ConfigError(f"{path}: got {value!r}, expected one of {choices}{hint_}")
        return value
    if origin is tuple:
        many = len(inner) == 2 and inner[1] is Ellipsis
        if not isinstance(value, (list, tuple)) or not (many or len(value) == len(inner)):
            wanted = "a list" if many else f"a list of {len(inner)}"
            raise ConfigError(f"{path}: got {_name(value)}, expected {wanted} {_type_name(hint)}")
        kinds = [inner[0]] * len(value) if many else inner
        return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if hint is float and not isinstance(value, bool):
        # YAML reads 1e-3 as a string, since it has no decimal point.
        try:
            return float(value) if isinstance(value, (int, float, str)) else float("x")
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}: got {_name(value)}, expected {_type_name(hint)}")


def _name(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _type_name(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if i is type(None) else _type_name(i) for i in inner)
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin is tuple:
        return f"[{', '.join('...' if i is Ellipsis else _type_name(i) for i in inner)}]"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(hint, str(hint))


def to_plain(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values; tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def explanations(cls: type) -> dict[str, str]:
    """Each field's explanation, from the ``Args:`` of the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _explained(inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2])
    return found


def _explained(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if begins := re.match(r" {4}(\w+): (.*)", line):
            name = begins[1]
            found[name] = begins[2]
        elif name and line.startswith(" " * 8):
            found[name] += " " + line.strip()
        else:
            name = ""
    return found


def _fields(config: Any, path: str = "") -> Iterator[tuple[str, Any, Any, str, bool]]:
    # path, type, value, explanation, may change; sections before what is in them, of type None
    about, hints = explanations(type(config)), typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), path + field.name
        if dataclasses.is_dataclass(value):
            yield name, None, value, about[field.name], False
            yield from _fields(value, f"{name}.")
        else:
            change = bool(field.metadata.get("may_change"))
            yield name, hints[field.name], value, about[field.name], change


def to_yaml(config: Any) -> str:
    """The configuration as YAML, each field with its type and explanation."""
    lines: list[str] = []
    for path, hint, value, about, _ in _fields(config):
        *parents, name = path.split(".")
        indent = "  " * len(parents)
        if hint is None:
            lines += ["", f"{indent}# {about}", f"{indent}{name}:"]
        else:
            lines.append(f"{indent}{name}: {json.dumps(value)}  # {_type_name(hint)}: {about}")
    return "\n".join(lines).lstrip("\n") + "\n"


def help_text(config: Any, width: int = 100) -> str:
    """Every field with its type, default and explanation, for ``--help``."""
    import textwrap

    lines: list[str] = []
    for path, hint, value, about, _ in _fields(config):
        if hint is None:
            lines += ["", f"{path}: {about}"]
            continue
        head = f"  {path}  ({_type_name(hint)}; default {json.dumps(value)})"
        lines += [
            head,
            *textwrap.wrap(about, width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines).lstrip("\n")


def differences(saved: Any, wanted: Any) -> list[str]:
    """``field = saved, not wanted`` for each field that determines the result and differs."""
    there = {path: value for path, hint, value, _, change in _fields(saved) if hint and not change}
    here = {path: value for path, hint, value, _, change in _fields(wanted) if hint and not change}
    return [
        f"{path} = {there[path]!r}, not {value!r}"
        for path, value in here.items()
        if there[path] != value
    ]


def plain_differences(saved: dict[str, Any], wanted: dict[str, Any], path: str = "") -> list[str]:
    """``name = saved, not wanted`` for each entry that differs, nested ones by their path."""
    found = []
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        there, here = saved.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found += plain_differences(there, here, f"{path}{name}.")
        elif there != here:
            found.append(f"{path}{name} = {there!r}, not {here!r}")
    return found
