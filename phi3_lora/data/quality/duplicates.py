"""Search for duplicate rows: exact ones by a hash, near ones by MinHash and true similarity.

Rows are near duplicates if their sets of word triples have a Jaccard similarity of at least
SIMILARITY. MinHash with bands proposes pairs; each pair is then verified on the true sets.

Source: Broder, On the resemblance and containment of documents (1997); Leskovec et al., Mining of
Massive Datasets, section 3.4 (bands).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.rows.conversation import Conversation, Message
from phi3_lora.errors import ConfigError
from phi3_lora.storage.optional import optional_package

SIMILARITY = 0.8
"""Least Jaccard similarity of the word triples of near duplicates."""
_NUM_PERM = 64
_BANDS = 16
"""Bands of 4 values each: a pair at SIMILARITY shares a band with probability 0.9998."""
_LEAST_AGREEMENT = 38
"""Least number of equal values of 64; a pair at SIMILARITY has 51 on average, deviation 3.2."""
_WINDOW = 64
"""Rows of one bucket that a row is compared with; rows of one template can all be in one bucket."""
_TRIES = 16
"""Failed comparisons of true sets after which the search for a row stops."""
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Scripts without spaces between words (Thai to Khmer, kana, Han): each character is a word."""
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
"""Odd multipliers, one for each position in a triple; word order then counts."""

Words = tuple[str, ...]


class Match(NamedTuple):
    """A row that repeats another one."""

    row: int
    other: int
    similarity: float
    """Jaccard similarity of the word triples."""
    is_exact: bool = False
    """True if the rows differ only in white space and Unicode form; False for near duplicates."""


class Groups:
    """Disjoint groups of items, joined pair by pair."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        """Return the number of an item's group: its least member."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        """Join the groups of two items."""
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first


def normalised(text: str) -> str:
    """Return a text for exact comparison: in Unicode NFC, with runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_key(row: Conversation) -> bytes:
    """Return a 128-bit hash of a row's turns that ignores white space and Unicode form.

    Tools and tool calls count, ids of calls do not.
    """
    digest = hashlib.blake2b(digest_size=16)
    for message in row.messages:
        text = f"{normalised(message_text(message))}\0{message.get('tools', '')}"
        part = f"{message['role']}\0{text}".encode(errors="replace")
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def exact_duplicates(rows: Sequence[Conversation]) -> list[Match]:
    """Match each row that repeats an earlier row to the first equal row."""
    return matches_of(map(exact_key, rows))


def matches_of(keys: Iterable[bytes]) -> list[Match]:
    """Match each row whose exact_key occurred before to the first row with that key."""
    first: dict[bytes, int] = {}
    found = ((i, first.setdefault(key, i)) for i, key in enumerate(keys))
    return [Match(i, other, 1.0, is_exact=True) for i, other in found if other != i]


def message_text(message: Message) -> str:
    """Return a message's content, with its tool calls as JSON without ids."""
    calls = message.get("tool_calls")
    if not calls:
        return str(message["content"])
    made = [{k: v for k, v in call.items() if k not in ("id", "index")} for call in calls]
    text = json.dumps(made, ensure_ascii=False, sort_keys=True)
    return f"{message['content']}\n{text}" if message["content"] else text


def conversation_text(row: Conversation) -> str:
    """Return the text by which near duplicates are compared: all messages but the system's."""
    return "\n".join(message_text(m) for m in row.messages if m["role"] != "system")


def can_find_near() -> bool:
    """Return whether the library for near duplicates is installed."""
    return importlib.util.find_spec("datasketch") is not None


def _datasketch() -> Any:
    return optional_package(
        "datasketch",
        extra="data",
        need="near duplicates need datasketch",
        error=ConfigError,
        otherwise=", or pass --no-near-duplicates",
    )


class NearIndex:
    """An index of texts by MinHash, to find near duplicates."""

    def __init__(self, texts: Sequence[str], signatures: NDArray[np.uint32] | None = None) -> None:
        """Compute signatures and buckets.

        Args:
            texts: the texts; a text without words has no near duplicate.
            signatures: (texts, 64) signatures, if they are known.

        Raises:
            ConfigError: when datasketch is not installed.
        """
        self._texts = texts
        self._triples = functools.lru_cache(maxsize=4096)(self._read_triples)
        self._signatures = _signatures(texts) if signatures is None else signatures
        """(rows, 64) uint32."""
        self._bands = [_band(self._signatures, band, texts) for band in range(_BANDS)]
        crowded = np.zeros(len(texts), dtype=bool)
        for _, start, place in self._bands:
            crowded |= place > start
        self._crowded = np.flatnonzero(crowded)

    @classmethod
    def of_rows(cls, rows: Iterable[Conversation]) -> NearIndex:
        """Index conversations by conversation_text.

        Raises:
            ConfigError: when datasketch is not installed.
        """
        return cls([conversation_text(row) for row in rows])

    def reordered(self, order: Sequence[int]) -> NearIndex:
        """Return an index of the texts in another order, without new signatures."""
        return NearIndex([self._texts[i] for i in order], self._signatures[list(order)])

    def _read_triples(self, row: int) -> frozenset[Words]:
        return word_triples(self._texts[row])

    def duplicates(self, first: int, last: int) -> Iterator[Match]:
        """Find rows of [first, last) that nearly repeat an earlier row of that range.

        The matches join all rows of a group; a row that connects several groups has several
        matches.
        """
        groups = Groups(last - first)
        for row in self._crowded[(self._crowded >= first) & (self._crowded < last)].tolist():
            failed = 0
            for other in self._candidates(row, first, row):
                if groups.find(row - first) == groups.find(other - first):
                    continue
                similarity = self._similarity(row, other)
                if similarity >= SIMILARITY:
                    groups.join(row - first, other - first)
                    yield Match(row, other, similarity)
                    continue
                failed += 1
                if failed == _TRIES:
                    break

    def leaks(self, boundary: int) -> Iterator[Match]:
        """Match rows from the boundary on to their best near duplicate before the boundary."""
        for row in self._crowded[self._crowded >= boundary].tolist():
            candidates = self._candidates(row, 0, boundary)[:_TRIES]
            scored = [(self._similarity(row, other), -other) for other in candidates]
            similarity, other = max(scored, default=(0.0, 0))
            if similarity >= SIMILARITY:
                yield Match(row, -other, similarity)

    def _candidates(self, row: int, first: int, last: int) -> list[int]:
        """Return rows of [first, last) that share a bucket with a row; the likeliest come first."""
        found = []
        for order, start, place in self._bands:
            bucket = order[start[row] : place[row]]
            if bucket.size:
                low, high = np.searchsorted(bucket, (first, last))
                found.append(bucket[max(low, high - _WINDOW) : high])
        if not found:
            return []
        others = np.unique(np.concatenate(found))
        agreement = (self._signatures[others] == self._signatures[row]).sum(axis=1)
        likely = others[np.argsort(-agreement, kind="stable")]
        return list(likely[: int((agreement >= _LEAST_AGREEMENT).sum())].tolist())

    def _similarity(self, row: int, other: int) -> float:
        one, two = self._triples(row), self._triples(other)
        common = len(one & two)
        return common / (len(one) + len(two) - common)


def words_of(text: str) -> list[str]:
    """Split a text into words without case and punctuation; see _UNSPACED for single characters."""
    return _WORD.findall(text.casefold())


def word_triples(text: str) -> frozenset[Words]:
    """Return the set of word triples of a text; a shorter text gives one tuple of its words."""
    words = words_of(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def _signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return the MinHash of word triples: (texts, 64) uint32; all bits are 1 without words."""
    minhash = _datasketch().MinHash(num_perm=_NUM_PERM, scheme="affine32", hashfunc=int)
    signatures = np.empty((len(texts), _NUM_PERM), dtype=np.uint32)
    for i, text in enumerate(texts):
        minhash.clear()
        minhash.update_batch(_triple_hashes(text))
        signatures[i] = minhash.hashvalues
    return signatures


def _triple_hashes(text: str) -> list[int]:
    """Hash each word triple to 32 bits; Python's own hash differs from run to run."""
    words = words_of(text)
    if not words:
        return []
    codes = np.zeros(max(3, len(words)), dtype=np.uint64)
    codes[: len(words)] = [zlib.crc32(word.encode(errors="replace")) for word in words]
    mixed = codes[:-2] * _MIX[0] + codes[1:-1] * _MIX[1] + codes[2:] * _MIX[2]
    return list((mixed >> np.uint64(32)).tolist())


def _band(
    signatures: NDArray[np.uint32], band: int, texts: Sequence[str]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Sort the rows into the buckets of one band.

    MinHashLSH of datasketch reads a whole bucket for each row in it, which takes hours for a large
    data set of one template.

    Returns:
        All rows by bucket, ascending in each bucket; for each row, the index at which its bucket
        starts in that list; for each row, its own index in that list.
    """
    width = _NUM_PERM // _BANDS
    part = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
    keys = part.view(np.dtype((np.void, part.itemsize * width))).ravel()
    bucket = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    wordless = np.flatnonzero((signatures == np.iinfo(np.uint32).max).all(axis=1))
    bucket[wordless] = len(texts) + np.arange(len(wordless))
    order = np.argsort(bucket, kind="stable")
    ordered = bucket[order]
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # int32 takes half the memory (16 bands, three numbers per row) and suffices for 2**31 rows.
    start = np.searchsorted(ordered, bucket)
    return order.astype(np.int32), start.astype(np.int32), place.astype(np.int32)
