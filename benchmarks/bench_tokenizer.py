"""Encoding speed against x-clip's tokenizer, on the same texts, with empty and with full caches.

    pytest benchmarks/bench_tokenizer.py --benchmark-group-by=param:kind,param:caches

"fresh" empties both word caches before every round. Four of five words are in the vocabulary. The
fifth joins two of them, so that no cache holds it.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from musiclm_fast import tokenizer as ours


def _captions(count: int) -> list[str]:
    """ASCII captions of a dozen words."""
    draw = random.Random(0)
    _, pieces = ours._tables()
    whole = [piece.decode() for piece in pieces if piece[:-1].isalpha() and piece.endswith(b" ")]

    def word() -> str:
        joined = draw.random() < 0.2
        return draw.choice(whole).strip() + draw.choice(whole) if joined else draw.choice(whole)

    return ["".join(word() for _ in range(12)) + "at 120 bpm." for _ in range(count)]


def _texts(kind: str) -> list[str]:
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    match kind:
        case "ascii":
            return _captions(200)
        case "accents":  # so that every text goes through ftfy
            return [text.replace("e", "\u00e9", 2) for text in _captions(200)]
        case "few_words":
            words = ["calm", "piano", "guitar", "drums", "slow", "it's", "loud", "&", "strings"]
            return [" ".join(draw.choices(words, k=10)) for _ in range(200)]
        case "long_word":
            return ["".join(draw.choices(letters, k=1000))]
    raise ValueError(kind)


def _our_tokenizer() -> tuple[Callable[[str], list[int]], Callable[[], None]]:
    return ours.tokenizer.encode, ours._cached_word_ids.cache_clear


def _x_clips() -> tuple[Callable[[str], list[int]], Callable[[], None]]:
    package = importlib.util.find_spec("x_clip")
    if package is None or not package.submodule_search_locations:
        pytest.skip("x-clip is not installed: pip install --no-deps x-clip")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("x_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def clear() -> None:
        module.tokenizer.cache = {special: special for special in ours.SPECIAL_IDS}

    return module.tokenizer.encode, clear


@pytest.fixture(scope="module", params=[_our_tokenizer, _x_clips], ids=["ours", "x_clip"])
def implementation(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("caches", ["fresh", "full"])
@pytest.mark.parametrize("kind", ["ascii", "accents", "few_words", "long_word"])
def test_encode(benchmark: Any, implementation: Any, kind: str, caches: str) -> None:
    encode, clear = implementation
    texts = _texts(kind)
    expected = [ours.tokenizer.encode(text) for text in texts]
    assert [encode(text) for text in texts] == expected
    benchmark.pedantic(
        lambda: [encode(text) for text in texts],
        setup=clear if caches == "fresh" else None,
        rounds=7,
    )
    own = encode.__self__ is ours.tokenizer
    benchmark.extra_info |= {
        "job": "encoding texts",
        "case": f"{len(texts)} x {kind}, {caches} caches",
        "contender": "ours" if own else "x-clip",
        "role": "ours" if own else "peer",
        "headline": "encoding 200 captions" if own and (kind, caches) == ("ascii", "full") else "",
    }
