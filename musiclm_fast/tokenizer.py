"""CLIP's byte-pair encoding: text to the 49,408 token ids that the text tower embeds.

The ids equal those of ``x_clip.tokenizer``, whatever the text. The text is cleaned (ftfy's
``fix_text``, HTML entities unescaped twice, lower case), split into words by CLIP's pattern, and
each word's UTF-8 bytes are joined pair by pair, the earliest learnt pair first.

Why not a library: CLIP's ids depend on ftfy and on the Unicode tables and case folding of the
``regex`` package, so those two do the cleaning and the splitting here as well. ``tokenizers`` and
``tiktoken`` split with other engines and other tables, and ``tiktoken`` knows no end-of-word
symbol; what they could take over is the joining of pairs, some thirty lines of this file, which
the word cache keeps off the hot path.

Why it is faster: plain ASCII text is a fixed point of the cleaning, so it skips ftfy and is split
by a narrow pattern of the standard library; a word that is one token is looked up, any other
costs O(n log n) instead of O(n^2), and both are remembered in a bounded cache. All state is the
module's (tables loaded on first use, that cache), so a tokenizer is free to make, to pickle and
to share between threads.

Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units",
https://arxiv.org/abs/1508.07909; the merges are those of Radford et al., "Learning Transferable
Visual Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020 (their licence
is in ``data/LICENSE-CLIP``).
"""

from __future__ import annotations

import heapq
import html
import importlib.resources
import operator
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from musiclm_fast._checks import check_ndim, check_positive_int, describe, fail
from musiclm_fast._wording import plural

if TYPE_CHECKING:
    import regex

VOCAB_SIZE = 49_408
PAD_ID = 0
SPECIAL_IDS = {"<|startoftext|>": VOCAB_SIZE - 2, "<|endoftext|>": VOCAB_SIZE - 1}
# ids: 256 bytes, the 256 bytes again as the end of a word, one per merge, the special tokens
NUM_MERGES = VOCAB_SIZE - 512 - len(SPECIAL_IDS)

CACHED_WORDS = 32_768  # at most about 10 MB
MAX_CACHED_WORD = 64  # characters; longer words rarely repeat

_SPECIAL_AND_SUFFIXES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
# Printable ASCII, tabs and line feeds, with every & standing alone: neither ftfy nor html.unescape
# has anything to change in it. In lower case, _PLAIN_WORD splits it as CLIP's pattern does.
_PLAIN = re.compile(r"(?:[\t\n -%'-~]+|&(?![^\t\n ]))*+")
_PLAIN_WORD = re.compile(_SPECIAL_AND_SUFFIXES + r"|[a-z]+|[0-9]|[^\sa-z0-9]+")


@cache
def _any_word() -> regex.Pattern[str]:
    """CLIP's pattern of a word."""
    import regex

    # IGNORECASE matters after lower(): a long s (U+017F) folds to s and has no other lower case.
    pattern = _SPECIAL_AND_SUFFIXES + r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    return regex.compile(pattern, regex.IGNORECASE)


@cache
def _byte_symbols() -> dict[int, str]:
    """The character that stands for each byte in the merges file, in the order of their ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def _tables() -> tuple[dict[int, int], list[bytes]]:
    """Id of every mergeable pair of ids, and the bytes of every id (with a space at a word's end).

    The pair (a, b) has the key ``a << 16 | b``: unlike tuples, integers cost the garbage collector
    nothing. A merge's id grows with its rank, so the id is also the order in which merges apply.
    """
    path = importlib.resources.files("musiclm_fast") / "assets" / "clip_merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines()[1:]  # the first is a header
    if len(lines) != NUM_MERGES:
        fail(str(path), plural(len(lines), "merge"), f"{NUM_MERGES:,}: the file is damaged")
    symbols = [*_byte_symbols().values()]
    ids = {symbol: i for i, symbol in enumerate(symbols + [s + "</w>" for s in symbols])}
    pieces = [bytes([byte]) for byte in _byte_symbols()]
    pieces += [piece + b" " for piece in pieces]
    merges = {}
    for merged, line in enumerate(lines, start=len(pieces)):
        left, right = line.split(" ")
        first, second = ids[left], ids[right]
        ids[left + right] = merges[first << 16 | second] = merged
        pieces.append(pieces[first] + pieces[second])
    pieces += [special.encode() for special in SPECIAL_IDS]
    return merges, pieces


def _merge(ids: list[int]) -> list[int]:
    """Apply the merges to one word's n byte ids: O(n log n) with a heap over a linked list.

    x-clip merges every occurrence of the earliest pair at once, left to right. Popping by
    (id, position) does the same: a pair holding a new symbol was learnt after that symbol.
    """
    merges, _ = _tables()
    n = len(ids)
    following = [*range(1, n + 1)]
    preceding = [*range(-1, n - 1)]
    # ids[n], beyond the end, is also ids[-1], before the start. No merge's key holds a -1: it makes
    # the key negative.
    ids.append(-1)
    heap = [
        merged * n + i
        for i in range(n - 1)
        if (merged := merges.get(ids[i] << 16 | ids[i + 1])) is not None
    ]
    heapq.heapify(heap)
    while heap:
        merged, i = divmod(heapq.heappop(heap), n)
        j = following[i]
        if merges.get(ids[i] << 16 | ids[j]) != merged:
            continue  # an earlier merge took one of the two
        ids[i], ids[j] = merged, -1
        following[i] = after = following[j]
        if after < n:
            preceding[after] = i
        before = preceding[i]
        if (new := merges.get(ids[before] << 16 | merged)) is not None:
            heapq.heappush(heap, new * n + before)
        if (new := merges.get(merged << 16 | ids[after])) is not None:
            heapq.heappush(heap, new * n + i)
    return [i for i in ids if i >= 0]


@cache
def _byte_ids() -> list[int]:
    """Id of each byte inside a word."""
    ids = {byte: i for i, byte in enumerate(_byte_symbols())}
    return [ids[byte] for byte in range(256)]


@cache
def _whole_words() -> dict[bytes, int]:
    """Id of every word that is one token, by its bytes and a space; the merges lead to each."""
    _, pieces = _tables()
    return {piece: i for i, piece in enumerate(pieces) if piece.endswith(b" ")}


def _word_ids(word: str) -> tuple[int, ...]:
    """Ids of one word of CLIP's pattern."""
    if word in SPECIAL_IDS:
        return (SPECIAL_IDS[word],)
    data = word.encode()
    if (whole := _whole_words().get(data + b" ")) is not None:
        return (whole,)
    byte_ids = _byte_ids()
    ids = [byte_ids[byte] for byte in data]
    ids[-1] += 256  # the end of a word
    return tuple(_merge(ids))


_cached_word_ids = lru_cache(CACHED_WORDS)(_word_ids)


def _words(text: str) -> list[str]:
    """Clean ``text`` and split it into words."""
    if _PLAIN.fullmatch(text):
        return _PLAIN_WORD.findall(text.lower())
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    # strip() drops the separators U+001C to U+001F, which the pattern does not count as spaces
    return _any_word().findall(text.strip().lower())


class SimpleTokenizer:
    """CLIP's byte-pair tokenizer, with ids equal to ``x_clip.tokenizer.SimpleTokenizer``'s.

    Where it differs from that class: text beyond ``context_length`` is truncated with a warning
    where x-clip raises; ids are always int64, where x-clip returns floats if the first text of a
    batch is empty; ``decode`` drops the end token, which x-clip keeps because of a typo.

    Source: Radford et al., https://arxiv.org/abs/2103.00020.
    """

    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without start, end or padding.

        Args:
            text: any string; lone surrogates become U+FFFD, the two special tokens
                ``<|startoftext|>`` and ``<|endoftext|>`` are recognised in any case.

        Returns:
            A list of ids in [0, 49408); empty for empty or blank text.

        Raises:
            TypeError: ``text`` is not a str.
        """
        if not isinstance(text, str):
            fail("text", describe(text), "a str", TypeError)
        ids: list[int] = []
        for word in _words(text):
            ids += _cached_word_ids(word) if len(word) <= MAX_CACHED_WORD else _word_ids(word)
        return ids

    def decode(
        self,
        tokens: Tensor | Sequence[int],
        remove_start_end: bool = True,
        pad_tokens: Collection[int] = (),
    ) -> str:
        """Text of one row of token ids: lower case, one space after each word.

        Args:
            tokens: ids in [0, 49408), a sequence or an integer tensor of shape (n,).
            remove_start_end: drop the start and end tokens and the padding (the zeros that end
                the row; a zero inside it is an exclamation mark, which x-clip loses).
            pad_tokens: further ids to drop.

        Returns:
            The text; bytes that are not UTF-8, as in a truncated character, become U+FFFD.

        Raises:
            TypeError: ``tokens`` holds something other than integers.
            ValueError: an id out of range, or a tensor that is not one row.
        """
        ids = _id_list(tokens)
        dropped = set(pad_tokens)
        if remove_start_end:
            while ids and ids[-1] == PAD_ID:
                ids.pop()
            dropped.update(SPECIAL_IDS.values())
        _, pieces = _tables()
        text = b"".join(pieces[i] for i in ids if i not in dropped)
        return text.decode("utf-8", errors="replace")

    def tokenize(
        self,
        texts: str | Sequence[str],
        context_length: int = 256,
        truncate_text: bool = False,
        pad_to_context_length: bool = False,
    ) -> Tensor:
        """Token ids of a batch of texts, padded with 0 to its longest.

        Args:
            texts: one text, or a sequence of B texts.
            context_length: most tokens a row may have.
            truncate_text: texts longer than that are expected: truncate without a warning.
            pad_to_context_length: pad to ``context_length`` instead.

        Returns:
            int64 tensor of shape (B, n), n = longest row <= ``context_length``; (B, 0) where all
            texts are empty.

        Raises:
            TypeError: ``texts`` is neither a str nor a sequence of them.
            ValueError: ``texts`` is empty or ``context_length`` is not a positive integer.
        """
        check_positive_int("context_length", context_length)
        rows = [self.encode(text) for text in _text_list(texts)]
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        if longest > context_length and not truncate_text:
            warnings.warn(
                f"texts: {sum(n > context_length for n in lengths)} of {len(rows)} have more than "
                f"context_length={context_length} tokens (the longest {longest}) and are "
                "truncated; truncate_text=True says that this is meant",
                stacklevel=2,
            )
        width = context_length if pad_to_context_length else min(longest, context_length)
        padded = [row[:width] + [PAD_ID] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64)  # (B, n)


def _text_list(texts: Any) -> list[str]:
    """``texts`` as a list of at least one str."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, (bytes, bytearray)):
        fail("texts", describe(texts), "a str or a sequence of str", TypeError)
    if not texts:
        fail("texts", describe(texts), "at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            fail(f"texts[{i}]", describe(text), "a str", TypeError)
    return list(texts)


def _id_list(tokens: Any) -> list[int]:
    """``tokens`` as a list of ids in the vocabulary."""
    if isinstance(tokens, Tensor):
        check_ndim("tokens", tokens, 1, "(n,)")
        tokens = tokens.tolist()
    if not isinstance(tokens, Iterable):
        fail("tokens", describe(tokens), "a sequence of ids or a tensor of shape (n,)", TypeError)
    ids = []
    for i, token in enumerate(tokens):
        try:
            ids.append(operator.index(token))
        except TypeError:
            fail(f"tokens[{i}]", describe(token), "an integer", TypeError)
        if not 0 <= ids[-1] < VOCAB_SIZE:
            fail(f"tokens[{i}]", token, f"an id in [0, {VOCAB_SIZE})")
    return ids


tokenizer = SimpleTokenizer()
