"""Token-by-token generation for both backends: rows, choice of tokens, LongRoPE's boundary.

A pass computes the new ids of several sequences, laid end to end like documents in training. The
new ids of a row are a whole prompt, the part of a prompt after a cached prefix, or the one id that
was just chosen. Nothing is padded, so a row's numbers do not depend on the other rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from phi3_lora.arrays import Bool, Float32, Int32
from phi3_lora.engine.random_streams import raw_stream
from phi3_lora.engine.request import Sampling
from phi3_lora.errors import DataError
from phi3_lora.models.config import ModelConfig

MAX_ROWS = 16
"""Most sequences decoded together. Attention runs once per sequence, so more would gain little."""
MIN_COMMON_TOKENS = 32
"""Shortest common prefix of all prompts that is encoded once: this costs one more pass."""


class KeyValues(Protocol):
    """Cached keys and values of one sequence on the device; a new cache is empty."""

    def prefix(self, length: int) -> Self:
        """Return a cache of the first `length` ids.

        Appending to one of the two caches does not change the other.
        """


Cache = TypeVar("Cache", bound=KeyValues)


class DecodingPass(NamedTuple, Generic[Cache]):
    """New ids of R sequences, laid end to end: T ids in total."""

    tokens: Int32
    """(T,) the new ids."""
    positions: Int32
    """(T,) position of each id in its sequence."""
    is_long: Bool
    """(T,) True where the sequence uses LongRoPE's long factors."""
    starts: Int32
    """(R + 1,) row r is tokens[starts[r]:starts[r + 1]], at least one id."""
    caches: Sequence[Cache]
    """R caches; each holds the ids before the row's first new id."""


class Decoder(Protocol[Cache]):
    """A model that caches keys and values."""

    def new_cache(self) -> Cache:
        """Return an empty cache."""

    def forward(self, rows: DecodingPass[Cache]) -> Float32:
        """Append the new ids to the caches and return logits.

        Returns:
            Logits after the last id of each row, (R, vocabulary).
        """


@dataclass(slots=True)
class Row(Generic[Cache]):
    """A prompt and its answer so far."""

    ids: list[int]
    """Ids of the prompt and of the answer so far."""
    is_long: bool
    """True if the cached keys use LongRoPE's long factors."""
    cache: Cache
    num_cached: int = 0
    """Number of ids whose keys and values are cached."""
    prompt: int = 0
    """Index of the prompt."""
    num_new: int = 0
    """Tokens of the answer so far."""


class PrefixCache(Generic[Cache]):
    """The cache of one earlier sequence, for prompts that start with the same ids.

    An engine whose model changes replaces this object. A generation that is still running then
    keeps its keys, which come from two different models, in the old object, which nothing reads.
    """

    def __init__(self) -> None:
        self._row: Row[Cache] | None = None

    def keep(self, row: Row[Cache]) -> None:
        """Keep this sequence and drop the earlier one."""
        self._row = row

    def forget(self) -> None:
        """Drop the sequence and free its memory."""
        self._row = None

    def start(
        self, decoder: Decoder[Cache], ids: list[int], *, is_long: bool, prompt: int = 0
    ) -> Row[Cache]:
        """Make a row; its cache holds the longest known prefix of the ids, without the last id."""
        kept = self._row
        if kept is None or kept.is_long != is_long:
            return Row(ids, is_long, decoder.new_cache(), prompt=prompt)
        length = _num_common(kept.ids[: kept.num_cached], ids[:-1])
        cache = kept.cache.prefix(length) if length else decoder.new_cache()
        return Row(ids, is_long, cache, length, prompt)


def decode(
    decoder: Decoder[Cache],
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    prefixes: PrefixCache[Cache],
    max_tokens: int,
) -> Iterator[tuple[int, int]]:
    """Generate an answer to each prompt; each answer is the same as for the prompt alone.

    The cached keys hold the angles of one set of LongRoPE factors. When a sequence grows over the
    boundary, the whole sequence is encoded again with the other set. Other sequences are not.

    Args:
        decoder: the model.
        config: the model's shape.
        prompts: ids of each prompt, of any length.
        sampling: settings that choose the tokens; each prompt uses the whole stream of draws.
        prefixes: the cache that lives from one call to the next.
        max_tokens: most tokens of all sequences decoded together, with their answers; a longer
            sequence is decoded alone.

    Yields:
        Index of the prompt and the next id; a stop token is the last one.

    Raises:
        DataError: when a prompt is empty or longer than the model's context.
    """
    limit = config.max_position_embeddings
    _check_lengths(prompts, limit)
    if sampling.max_new_tokens < 1:
        return
    waiting = deque((index, list(prompt)) for index, prompt in enumerate(prompts))
    _encode_common_prefix(decoder, config, [ids for _, ids in waiting], prefixes)
    rows: list[Row[Cache]] = []
    while waiting or rows:
        admitted = [waiting.popleft() for _ in range(_room(rows, waiting, sampling, max_tokens))]
        for index, ids in admitted:
            rows.append(prefixes.start(decoder, ids, is_long=_is_long(config, ids), prompt=index))
        if admitted:
            # The rows that start with these keys hold them now.
            prefixes.forget()
        growing = []
        for row, row_logits in zip(rows, _feed(decoder, rows), strict=True):
            token = choose_token(row_logits, sampling, row.num_new)
            row.ids.append(token)
            row.num_new += 1
            yield row.prompt, token
            is_last = row.num_new == sampling.max_new_tokens or len(row.ids) > limit
            if is_last or token in sampling.stop_ids:
                prefixes.keep(row)
                continue
            if _is_long(config, row.ids) != row.is_long:
                row.is_long = not row.is_long
                row.cache, row.num_cached = decoder.new_cache(), 0
            growing.append(row)
        rows = growing


def _check_lengths(prompts: Sequence[Sequence[int]], limit: int) -> None:
    for prompt in prompts:
        if not 0 < len(prompt) <= limit:
            raise DataError(
                f"the prompt has {len(prompt):,} tokens; the model takes 1 to {limit:,}"
            )


def _num_common(*sequences: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _is_long(config: ModelConfig, ids: Sequence[int]) -> bool:
    return bool(config.uses_long_factors(len(ids)))


def _encode_common_prefix(
    decoder: Decoder[Cache],
    config: ModelConfig,
    prompts: list[list[int]],
    prefixes: PrefixCache[Cache],
) -> None:
    """Encode the common prefix of several prompts and keep its cache."""
    common = prompts[0][: _num_common(*prompts)] if prompts else []
    sides = {_is_long(config, ids) for ids in prompts}
    if len(prompts) < 2 or len(sides) > 1 or len(common) < MIN_COMMON_TOKENS:
        return
    row = prefixes.start(decoder, common, is_long=sides.pop())
    _feed(decoder, [row])
    prefixes.keep(row)


def _room(
    rows: Sequence[Row[Cache]],
    waiting: Sequence[tuple[int, list[int]]],
    sampling: Sampling,
    max_tokens: int,
) -> int:
    """Return the number of waiting prompts that join the rows; each answer counts in full."""
    held = sum(len(row.ids) - row.num_new + sampling.max_new_tokens for row in rows)
    room = MAX_ROWS - len(rows)
    for count, (_, ids) in enumerate(waiting):
        held += len(ids) + sampling.max_new_tokens
        if count == room or (held > max_tokens and (rows or count)):
            return count
    return len(waiting)


def _feed(decoder: Decoder[Cache], rows: Sequence[Row[Cache]]) -> Float32:
    """Encode the ids that are not cached yet.

    Returns:
        Logits after the last id of each row, (R, vocabulary).
    """
    spans = [range(row.num_cached, len(row.ids)) for row in rows]
    lengths = [len(span) for span in spans]
    logits = decoder.forward(
        DecodingPass(
            np.concatenate([np.array(row.ids[row.num_cached :], np.int32) for row in rows]),
            np.concatenate([np.array(span, np.int32) for span in spans]),
            np.repeat([row.is_long for row in rows], lengths),
            np.cumsum([0, *lengths]).astype(np.int32),
            [row.cache for row in rows],
        )
    )
    for row in rows:
        row.num_cached = len(row.ids)
    return logits


def choose_token(logits: Float32, sampling: Sampling, index: int) -> int:
    """Choose a new token: the largest logit, or a draw that is equal on every backend.

    Args:
        logits: (vocabulary,).
        sampling: temperature and seed.
        index: number of the new token in its answer, from 0.
    """
    if sampling.temperature <= 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.cumsum(np.exp(scaled - scaled.max()))
    draw = int(raw_stream(sampling.seed, "sample", index, size=1)[0]) / 2**64
    return int(min(np.searchsorted(weights, draw * weights[-1], side="right"), len(weights) - 1))
