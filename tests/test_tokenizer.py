"""The tokenizer's ids against x-clip's: live where it is installed, golden everywhere."""

from __future__ import annotations

import html
import importlib.util
import json
import pickle
import subprocess
import sys
import threading
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import ftfy
import pytest
import regex
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import musiclm_fast.tokenizer as module
from musiclm_fast.tokenizer import SimpleTokenizer, tokenizer

# [text, x-clip's ids]; texts whose ids do not depend on the version of Unicode
GOLDEN = json.loads(Path(__file__).with_name("tokenizer_golden.json").read_text())

DIFFICULT = [
    *("&amp;", "&lt", "&#39;", "&#xd83c;", "&ampamp;", "&;", "& ", "<b>", "'s", "'\u017f", "'RE"),
    *("<|startoftext|>", "<|EndOfText|>", "<|", "</w>", "\u00c3\u00a9", "\u00e2\u20ac\u2122"),
    *("\u0130", "\u03a3", "\u212a", "\ufb01", "\uff21", "e\u0301", "\U0001f469\u200d\U0001f3a4"),
    *("\ud83c", "\udfb8", "\r\n", "\x1c", "\x85", "\x1b[1m", "\u2028", "\xa0", "\x00", "\ufffd"),
    *("ha" * 20, "!" * 10, "the", "Piano", " ", "7", "\u0669", "\u00bd"),
]
texts = st.one_of(
    st.text(max_size=40),  # every category but surrogates
    st.text(st.characters(max_codepoint=0x24F, categories=None), max_size=40),
    st.lists(st.sampled_from(DIFFICULT) | st.characters(categories=None), max_size=10).map("".join),
    st.text("aeiosth'!?&;#x3 ", max_size=100),
)
live_settings = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def x_clip() -> Any:
    """x-clip's tokenizer; its module is loaded by path, as its package imports torchvision."""
    package = importlib.util.find_spec("x_clip")
    if package is None or not package.submodule_search_locations:
        pytest.skip("x-clip is not installed: pip install --no-deps x-clip")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("x_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize(("text", "ids"), GOLDEN, ids=[ascii(text)[:40] for text, _ in GOLDEN])
def test_golden_ids(text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


def test_golden_ids_are_x_clips(x_clip: Any) -> None:
    assert [[text, x_clip.tokenizer.encode(text)] for text, _ in GOLDEN] == GOLDEN


@live_settings
@given(batch=st.lists(texts, min_size=4, max_size=8))
def test_ids_equal_x_clips(x_clip: Any, batch: list[str]) -> None:
    for text in batch:
        assert tokenizer.encode(text) == x_clip.tokenizer.encode(text)


def test_ids_of_single_characters_equal_x_clips(x_clip: Any) -> None:
    for code in [*range(0x400), *range(0x400, sys.maxunicode + 1, 101)]:
        assert tokenizer.encode(chr(code)) == x_clip.tokenizer.encode(chr(code)), hex(code)


@pytest.mark.parametrize("letters", ["a", "ha", "etaoinshr", "!?.", "\u00e9\u00f1", "\U0001f3b5"])
@pytest.mark.parametrize("length", [2, 3, 63, 64, 65, 300])
def test_ids_of_long_words_equal_x_clips(x_clip: Any, letters: str, length: int) -> None:
    # a fixed walk through the letters that never becomes periodic
    text = "".join(letters[(i * i // 3) % len(letters)] for i in range(length))
    assert tokenizer.encode(text) == x_clip.tokenizer.encode(text)


@settings(live_settings, max_examples=150)
@given(text=st.from_regex(module._PLAIN, fullmatch=True))
def test_plain_text_needs_no_cleaning(text: str) -> None:
    assert html.unescape(html.unescape(ftfy.fix_text(text))) == text
    lower = text.lower()
    assert module._PLAIN_WORD.findall(lower) == module._any_word().findall(lower)


def test_whitespace_never_reaches_a_word() -> None:
    # x-clip also folds white space before it splits: neutral, as its pattern takes none.
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    spaces = regex.findall(r"\s", everything)
    assert all(space.isspace() for space in spaces)
    assert module._any_word().findall("".join(spaces)) == []


def test_every_vocabulary_entry_is_its_own_encoding() -> None:
    # So looking whole words up skips nothing that the merges would have done otherwise.
    _, pieces = module._tables()
    assert len(pieces) == len(set(pieces)) == tokenizer.vocab_size == 49_408
    byte_ids = module._byte_ids()
    for i, piece in enumerate(pieces[512 : 512 + module.NUM_MERGES], start=512):
        ids = [byte_ids[byte] for byte in piece.removesuffix(b" ")]
        ids[-1] += 256 * piece.endswith(b" ")
        assert module._merge(ids) == [i]


def test_a_merge_comes_after_its_parts() -> None:
    # What makes the heap's order equal to x-clip's.
    merges, _ = module._tables()
    assert [*merges.values()] == [*range(512, 512 + module.NUM_MERGES)]
    assert all(max(pair >> 16, pair & 0xFFFF) < merged for pair, merged in merges.items())


def test_merges_file_is_the_used_part_of_x_clips(x_clip: Any) -> None:
    ours = Path(module.__file__).with_name("assets") / "clip_merges.txt"
    theirs = Path(x_clip.default_bpe()).read_bytes().split(b"\n")
    assert ours.read_bytes() == b"\n".join(theirs[: 1 + module.NUM_MERGES]) + b"\n"
    assert "Copyright (c) 2021 OpenAI" in ours.with_name("LICENSE-CLIP").read_text()


def test_a_very_long_word_takes_no_quadratic_time() -> None:
    word = "music" * 20_000  # hours in x-clip
    ids = tokenizer.encode(word)
    assert tokenizer.decode(ids) == word + " "


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("batch", ["a single text", ["one"], ["calm piano", "", "a b c d"], [""]])
def test_tokenize_equals_x_clips(x_clip: Any, batch: str | list[str], pad: bool) -> None:
    ours = tokenizer.tokenize(batch, 32, pad_to_context_length=pad)
    theirs = x_clip.tokenizer.tokenize(batch, 32, pad_to_context_length=pad)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, theirs.long())  # theirs is float if the first text is empty


def test_tokenize_pads_with_zero_to_the_longest() -> None:
    tokens = tokenizer.tokenize(["", "calm piano", "calm"])
    calm, piano = tokenizer.encode("calm piano")
    assert tokens.tolist() == [[0, 0], [calm, piano], [calm, 0]]


@pytest.mark.parametrize("batch", [[""], ["", " \n"]])
def test_tokenize_empty_texts(batch: list[str]) -> None:
    tokens = tokenizer.tokenize(batch)
    assert tokens.shape == (len(batch), 0)
    assert tokens.dtype == torch.int64
    padded = tokenizer.tokenize(batch, 5, pad_to_context_length=True)
    assert torch.equal(padded, torch.zeros(len(batch), 5, dtype=torch.int64))


def test_tokenize_truncates_with_one_warning_per_call() -> None:
    batch = ["calm " * 9, "piano", "strings " * 12]
    with pytest.warns(UserWarning, match=r"2 of 3 .*context_length=4 .*longest 12") as caught:
        tokens = tokenizer.tokenize(batch, context_length=4)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert tokens.shape == (3, 4)
    assert tokens[0].tolist() == tokenizer.encode("calm") * 4
    assert tokens[1].tolist() == [*tokenizer.encode("piano"), 0, 0, 0]


def test_tokenize_truncates_in_silence_when_asked(x_clip: Any) -> None:
    batch = ["calm " * 300, "piano"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = tokenizer.tokenize(batch, truncate_text=True)
        exact = tokenizer.tokenize("calm " * 256)
    assert tokens.shape == (2, 256)
    assert exact.shape == (1, 256)
    assert torch.equal(tokens, x_clip.tokenizer.tokenize(batch, truncate_text=True))


letter = st.characters(categories=["Ll", "Lo", "Nd", "So"])


@settings(live_settings, max_examples=150)
@given(words=st.lists(st.text(letter | st.sampled_from("!?-"), min_size=1, max_size=12)))
def test_round_trip(words: list[str]) -> None:
    text = unicodedata.normalize("NFC", " ".join(words))
    if ftfy.fix_text(text).lower() != text:
        return  # not clean: the round trip gives the cleaned text
    row = tokenizer.tokenize(text, context_length=2048)[0]
    assert tokenizer.decode(row).replace(" ", "") == text.replace(" ", "")


def test_decode() -> None:
    start, end = module.SPECIAL_IDS.values()
    ids = tokenizer.encode("Calm piano?")
    assert tokenizer.decode(ids) == "calm piano ? "
    assert tokenizer.decode([start, *ids, end, 0, 0]) == "calm piano ? "  # x-clip keeps the end
    assert tokenizer.decode(torch.tensor([start, *ids, 0])) == "calm piano ? "
    assert tokenizer.decode([start, *ids, end], remove_start_end=False) == (
        "<|startoftext|>calm piano ? <|endoftext|>"
    )
    assert tokenizer.decode(ids, pad_tokens={ids[0]}) == "piano ? "
    assert tokenizer.decode(tokenizer.encode('!" !?')) == '!" !? '  # the first begins with id 0
    assert tokenizer.decode([]) == tokenizer.decode([0, 0]) == ""


def test_decode_equals_x_clips(x_clip: Any) -> None:
    for text, ids in GOLDEN:
        if not set(ids) & {0, *module.SPECIAL_IDS.values()} and "</w>" not in text:
            assert tokenizer.decode(ids) == x_clip.tokenizer.decode(ids)
    truncated = tokenizer.encode("\U0001f3b5\u97f3" * 3)[:2]
    assert tokenizer.decode(truncated) == x_clip.tokenizer.decode(truncated)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (b"bytes", TypeError, r"texts: got b'bytes' \(bytes\), expected a str or a sequence"),
        (None, TypeError, "texts: got None"),
        (7, TypeError, "texts: got 7"),
        ({"a text"}, TypeError, "texts: got {'a text'}"),
        ([], ValueError, r"texts: got \[\] \(list\), expected at least one text"),
        (["a", b"b"], TypeError, r"texts\[1\]: got b'b' \(bytes\), expected a str"),
        (["a", None], TypeError, r"texts\[1\]: got None"),
        (torch.zeros(2), TypeError, "texts: got a float32 tensor of shape"),
    ],
)
def test_tokenize_refuses(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenizer.tokenize(batch)


@pytest.mark.parametrize("length", [0, -1, 2.5, True])
def test_tokenize_refuses_context_length(length: Any) -> None:
    with pytest.raises(ValueError, match="context_length"):
        tokenizer.tokenize("a", context_length=length)


def test_encode_refuses_bytes() -> None:
    with pytest.raises(TypeError, match="text: got b'a'"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([0, 49_408], ValueError, r"tokens\[1\]: got 49408, expected an id in \[0, 49408\)"),
        ([-1], ValueError, r"tokens\[0\]: got -1"),
        ([1.5], TypeError, r"tokens\[0\]: got 1.5"),
        (5, TypeError, "tokens: got 5"),
        ("text", TypeError, r"tokens\[0\]: got 't'"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"tokens: .*\(2, 3\).*\(n,\)"),
        (torch.zeros(2), TypeError, r"tokens\[0\]: got 0.0"),
    ],
)
def test_decode_refuses(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenizer.decode(tokens)


def test_corrupt_merges_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "clip_merges.txt").write_text("header\na b\n")
    monkeypatch.setattr(module.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=r"clip_merges\.txt: got 1 merge, expected 48,894"):
        module._tables.__wrapped__()


def test_threads_share_the_tokenizer() -> None:
    expected = [ids for _, ids in GOLDEN]
    for table in (module._tables, module._whole_words, module._any_word, module._cached_word_ids):
        table.cache_clear()
    barrier = threading.Barrier(8)
    results: list[list[list[int]]] = []

    def work() -> None:
        barrier.wait()
        for _ in range(3):
            results.append([tokenizer.encode(text) for text, _ in GOLDEN])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 24


def test_pickling() -> None:
    data = pickle.dumps(tokenizer)
    assert len(data) < 200  # no tables in it
    copy = pickle.loads(data)
    assert isinstance(copy, SimpleTokenizer)
    assert copy.encode("calm piano") == tokenizer.encode("calm piano")


def test_data_loader_workers() -> None:
    batch = ["calm piano", "", "it's \u00e9lan"]
    loader = DataLoader(batch, batch_size=3, num_workers=2, collate_fn=tokenizer.tokenize)
    (tokens,) = loader
    assert torch.equal(tokens, tokenizer.tokenize(batch))


def test_cache_is_bounded() -> None:
    module._cached_word_ids.cache_clear()
    tokenizer.encode("z" * module.MAX_CACHED_WORD + " " + "z" * (module.MAX_CACHED_WORD + 1))
    info = module._cached_word_ids.cache_info()
    assert (info.currsize, info.maxsize) == (1, module.CACHED_WORDS)


def test_import_loads_nothing() -> None:
    code = (
        "import sys; from musiclm_fast import tokenizer as t;"
        "assert t.tokenizer.vocab_size == 49408;"
        "assert not {'regex', 'ftfy', 'torchvision'} & set(sys.modules);"
        "assert t._tables.cache_info().currsize == 0;"
        "assert t.tokenizer.encode('calm') and 'ftfy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1000)
