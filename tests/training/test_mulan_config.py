"""Typed configurations: what is read, what is refused and how, and what is explained."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from musiclm_fast._config import (
    ConfigError,
    differences,
    explanations,
    from_plain,
    help_text,
    read_config,
    setting,
    to_plain,
    to_yaml,
)
from musiclm_fast.training.mulan_config import TrainMuLaNConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Inner:
    """Inside.

    Args:
        rate: how fast,
            in Hz
        sizes: two of them
    """

    rate: float = 2.0
    sizes: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate: got {self.rate}, expected at least 0")


@dataclass(frozen=True)
class Outer:
    """Outside.

    Args:
        steps: how many
        name: of it
        kind: which
        tags: any number
        flag: or not
        inner: the inside
    """

    steps: int = 3
    name: str | None = None
    kind: Literal["no", "yes"] = "yes"
    tags: tuple[str, ...] = setting((), may_change=True)
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def test_values(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 5\ninner: {rate: 1e-3, sizes: [4, 5]}\nkind: no\n")
    config = read_config(Outer, tmp_path / "c.yaml", ["name=x", "inner.rate=7", "tags=[a, b]"])
    assert config == Outer(5, "x", "no", ("a", "b"), False, Inner(7.0, (4, 5)))
    assert read_config(Outer, None) == Outer()
    (tmp_path / "empty.yaml").write_text("# nothing\ninner:\n")
    assert read_config(Outer, tmp_path / "empty.yaml") == Outer()


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    assert read_config(Outer, None, ["inner.rate=1e-4"]).inner.rate == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stesp=3", r"^stesp: no such field; did you mean steps\? There are steps, name, kind"),
        ("inner.rte=3", r"^inner\.rte: no such field; did you mean inner\.rate\? There are rate"),
        ("wholly=3", "^wholly: no such field; There are"),
        ("steps=x", r"^steps: got 'x' \(str\), expected integer"),
        ("steps=1.5", r"^steps: got 1\.5 \(float\), expected integer"),
        ("steps=true", r"^steps: got True \(bool\), expected integer"),
        ("steps=null", r"^steps: got None \(NoneType\), expected integer"),
        ("flag=1", r"^flag: got 1 \(int\), expected true or false"),
        ("name=3", r"^name: got 3 \(int\), expected text"),
        ("kind=yess", r"^kind: got 'yess', expected one of no, yes \(did you mean yes\?\)"),
        ("inner.rate=fast", r"^inner\.rate: got 'fast' \(str\), expected number"),
        ("inner.rate=true", r"^inner\.rate: got True \(bool\), expected number"),
        ("inner.rate=-1", r"^inner\.rate: got -1\.0, expected at least 0"),
        ("inner.sizes=[1]", r"^inner\.sizes: got \[1\] \(list\), expected a list of 2 \[integer"),
        ("inner.sizes=[1, x]", r"^inner\.sizes\[1\]: got 'x' \(str\), expected integer"),
        ("tags=a", r"^tags: got 'a' \(str\), expected a list \[text, \.\.\.\]"),
        ("inner=3", r"^inner: got 3 \(int\), expected its fields"),
        ("steps", "^set: got 'steps', expected FIELD=VALUE"),
        ("steps=[", r"^set steps is no YAML"),
    ],
)
def test_errors_name_the_field(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(Outer, None, [override])


def test_old_names_of_values(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {front_end: reference}")
    assert read_config(TrainMuLaNConfig, file).model.front_end == "upstream"


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config: no file .*none\.yaml"):
        read_config(Outer, tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "is no YAML"),
        ("- 3", r"holds \[3\] \(list\), expected fields"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(Outer, tmp_path / "bad.yaml")


def test_written_and_read_again() -> None:
    for config in (Outer(), Outer(9, "a: b # c", "no", ("x",), True, Inner(1e-9, (7, 8)))):
        assert from_plain(Outer(), yaml.safe_load(to_yaml(config))) == config
        assert from_plain(Outer(), to_plain(config)) == config
    text = to_yaml(Outer())
    assert "# the inside\ninner:\n  rate: 2.0  # number: how fast, in Hz\n" in text
    assert 'kind: "yes"  # no | yes: which\n' in text


def test_what_differs() -> None:
    other = Outer(tags=("new",), flag=True, inner=Inner(sizes=(1, 3)))
    assert differences(Outer(), other) == [
        "flag = False, not True",
        "inner.sizes = (1, 2), not (1, 3)",
    ]


# ---- the configuration of train mulan


def sections(cls: type) -> list[type]:
    inner = [
        f.default_factory for f in dataclasses.fields(cls) if isinstance(f.default_factory, type)
    ]
    return [cls, *(each for part in inner for each in sections(part))]


@pytest.mark.parametrize("cls", sections(TrainMuLaNConfig), ids=lambda cls: cls.__name__)
def test_every_field_is_explained(cls: type) -> None:
    assert list(explanations(cls)) == [field.name for field in dataclasses.fields(cls)]


def test_the_printed_configuration_is_the_default() -> None:
    assert from_plain(TrainMuLaNConfig(), yaml.safe_load(to_yaml(TrainMuLaNConfig()))) == (
        TrainMuLaNConfig()
    )
    for path in ("training.keep_last", "model.audio.patch_size", "data.source"):
        assert f"\n  {path}  (" in help_text(TrainMuLaNConfig())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=1", "training.batch_size: got 1, expected at least 2"),
        ("training.steps=0", "training.steps: got 0, expected above 0"),
        ("training.ema_decay=1.0", r"training.ema_decay: got 1.0, expected a share in \[0, 1\)"),
        (
            "model.front_end=mel",
            "model.front_end: got 'mel', expected one of mulan, ast, upstream",
        ),
        ("model.audio.dim=10", "model.audio.dim: got 10, expected a multiple of 4"),
        ("model.audio.patch_size=[0, 4]", "model.audio.patch_size: got"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas: got"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: got 0.0, expected above 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: got inf, expected above 0"),
        ("schedule.final=1.5", r"schedule.final: got 1.5, expected a share in \[0, 1\]"),
        ("data.num_workers=-1", "data.num_workers: got -1, expected at least 0"),
        ("trainin.steps=3", r"trainin: no such field; did you mean training\?"),
        ("training.batchsize=3", "did you mean training.batch_size"),
    ],
)
def test_ranges(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(TrainMuLaNConfig, None, [override])


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom musiclm_fast._config import *\n"
        "from musiclm_fast.training.mulan_config import TrainMuLaNConfig\n"
        "help_text(TrainMuLaNConfig()), read_config(TrainMuLaNConfig, None, ['training.steps=3'])\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_defaults_delete_nothing_and_use_log_mel() -> None:
    config: Any = TrainMuLaNConfig()
    assert config.training.keep_last is None
    assert config.model.front_end == "mulan"
