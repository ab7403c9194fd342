"""The 128 General MIDI instruments, their names in words, and texts about them."""

from __future__ import annotations

import csv
import importlib.resources
import io
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instrument:
    """One General MIDI program.

    Args:
        program: 0 to 127.
        name: the General MIDI name in lower case, the label of zero-shot classification.
        synonyms: other ways to say it, used by captions.
        family: one of the sixteen General MIDI families.
    """

    program: int
    name: str
    synonyms: tuple[str, ...]
    family: str


def _read_table() -> tuple[Instrument, ...]:
    file = importlib.resources.files("musiclm_fast") / "assets" / "general_midi.csv"
    rows = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))
    return tuple(
        Instrument(
            int(row["program"]), row["name"], tuple(row["synonyms"].split("; ")), row["family"]
        )
        for row in rows
    )


INSTRUMENTS: tuple[Instrument, ...] = _read_table()


# Captions of the training notes; {name} is the name or a synonym, {a} its article,
# {register} how high it sounds.
TRAIN_TEMPLATES: tuple[str, ...] = (
    "{name}",
    "{a} {name}",
    "the sound of {a} {name}",
    "a recording of {a} {name}",
    "a {register} note on {a} {name}",
    "{name}, {register} register",
    "a single note played by {a} {name}",
    "someone plays the {name}",
)


# Prompts of the evaluation: no training caption has these forms.
PROMPT_TEMPLATES: tuple[str, ...] = (
    "this is {a} {name}",
    "music played with {a} {name}",
    "one hears the {name}",
)


def zero_shot_prompts(
    instruments: Sequence[Instrument], templates: Sequence[str] = PROMPT_TEMPLATES
) -> list[list[str]]:
    """Text prompts of a zero-shot classification, one list of paraphrases per instrument.

    Args:
        instruments: the labels.
        templates: forms with a ``{name}`` field, and ``{a}`` for its article.

    Returns:
        ``prompts[i][j]``: template j filled with the name of instrument i.
    """
    return [[fill(form, item.name) for form in templates] for item in instruments]


def fill(template: str, name: str, register: str = "") -> str:
    """A caption from its template."""
    return template.format(a="an" if name[0] in "aeiou" else "a", name=name, register=register)


def register_of(pitch: int) -> str:
    """How high a MIDI pitch sounds, in a word."""
    return "low" if pitch < 52 else "middle" if pitch < 72 else "high"
