"""Messages with counts: "1 sounds" does not occur."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import musiclm_fast
from musiclm_fast._wording import plural

PACKAGE = Path(musiclm_fast.__file__).parent
COUNTED = (
    "batch(es)?|captions?|cells|channels|clips|columns|entries|files|frames|heads|instruments|"
    "labels|melodies|notes|pairs|patches|processes|prompts|rows|samples|sounds|steps|texts|times|"
    "tokens|windows"
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, "sound"), "0 sounds"),
        ((1, "sound"), "1 sound"),
        ((2, "sound"), "2 sounds"),
        ((1200, "sound"), "1,200 sounds"),
        ((1, "patch", "patches"), "1 patch"),
        ((3, "patch", "patches"), "3 patches"),
    ],
)
def test_plural(arguments: tuple, expected: str) -> None:
    assert plural(*arguments) == expected


def test_messages_count_with_plural() -> None:
    # What follows "=" is the value of an argument that the message names.
    counted = re.compile(rf"(?<!=)(?<!= )\{{(len\([^{{}}]*\)|[\w.]+)(:,)?\}} ({COUNTED})\b")
    found = [
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for match in counted.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []
