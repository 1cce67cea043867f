"""Encoding of rows as documents, part by part, with flags for the outcome of each row.

This module keeps the documents in memory; store.py keeps them on the disk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.documents.truncation import LEFT, RIGHT, shorten
from phi3_lora.data.options import LOSS_ON, ON_BAD_ROW, LossOn, OnBadRow, TooLong
from phi3_lora.data.options import TOO_LONG as TOO_LONG_VALUES
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import ConfigError

UNRENDERED, TOO_LONG, SHORTENED, HAS_MARKER_TEXT, SYSTEM_DROPPED = (1 << i for i in range(5))
"""Flags of a row: it cannot be rendered, is too long, was shortened to fit, holds the text of a
marker, lost its system message."""
ROW = np.dtype(
    [
        ("length", "<i4"),
        ("num_tokens", "<i4"),
        ("loss_tokens", "<i4"),
        ("num_stripped", "<i4"),
        ("flags", "<u4"),
    ]
)
"""Facts of a row: tokens before shortening, tokens of its document (0 without one), tokens in the
loss, white-space characters that markers strip, flags."""
_ROWS_AT_ONCE = 8_000
_CHARACTERS_AT_ONCE = 1 << 24
_CHOICES = {"loss_on": LOSS_ON, "too_long": TOO_LONG_VALUES, "on_bad_row": ON_BAD_ROW}
"""Field of Encoding -> its allowed values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """Settings of the encoding of rows as documents."""

    max_length: int
    """Tokens that a document may have by the settings."""
    context: int | None = None
    """Tokens that the model can process (max_position_embeddings); None sets no limit."""
    loss_on: LossOn = "assistant"
    """The messages in the loss; weights of a row take precedence."""
    too_long: TooLong = "drop"
    """The treatment of rows that are longer than the limit."""
    on_bad_row: OnBadRow = "error"
    """The treatment of rows that cannot be used."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")

    @property
    def limit(self) -> int:
        """Tokens that a document may have."""
        return self.max_length if self.context is None else min(self.max_length, self.context)

    @property
    def limit_name(self) -> str:
        """The name of the limit in messages, for example `max_length 2,048`."""
        name = "max_length" if self.limit == self.max_length else "the model's context of"
        return f"{name} {self.limit:,}"

    def identity(self) -> dict[str, int | str]:
        """Return the settings that documents depend on, for a hash."""
        return {"limit": self.limit, **{name: getattr(self, name) for name in _CHOICES}}


class EncodedRow(NamedTuple):
    """A row with its document and its outcome."""

    document: Document | None
    """None if the row cannot be rendered or does not fit."""
    source: str
    """file:line."""
    length: int
    """Number of tokens before shortening."""
    flags: int
    problem: str = ""
    """`file:line: reason` if the row cannot be rendered; otherwise empty."""

    @property
    def facts(self) -> tuple[int, ...]:
        """The facts of the row, in the order of ROW."""
        document = self.document
        if document is None:
            return self.length, 0, 0, 0, self.flags
        remarks = document.remarks
        flags = self.flags | HAS_MARKER_TEXT * remarks.has_marker_text
        flags |= SYSTEM_DROPPED * remarks.system_dropped
        num_tokens = len(document.tokens)
        return self.length, num_tokens, document.loss_tokens, remarks.num_stripped, flags


class EncodedRows(Protocol):
    """Encoded rows of sources, in memory or on the disk."""

    @property
    def rows(self) -> NDArray[Any]:
        """(N,) facts of each row, of dtype ROW."""

    @property
    def counts(self) -> Sequence[int]:
        """Number of rows of each source, in order."""

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the user on reading the rows."""

    def source(self, row: int) -> str:
        """Return the file:line of a row."""

    def problem(self, row: int) -> str:
        """Return `file:line: reason` of a row that cannot be rendered."""

    def documents(self, rows: NDArray[np.int64]) -> Sequence[Document]:
        """Return the documents of rows in the given order; each row must have one."""


class InMemory:
    """Encoded rows in memory."""

    def __init__(
        self, encoded: Sequence[EncodedRow], counts: Sequence[int] = (), notes: Sequence[str] = ()
    ) -> None:
        """Store encoded rows, and collect their facts."""
        self._encoded = encoded
        self.rows = np.array([row.facts for row in encoded], dtype=ROW)
        self.counts = counts
        self.notes = notes

    def source(self, row: int) -> str:
        """Return the file:line of a row."""
        return self._encoded[row].source

    def problem(self, row: int) -> str:
        """Return `file:line: reason` of a row that cannot be rendered."""
        return self._encoded[row].problem

    def documents(self, rows: NDArray[np.int64]) -> list[Document]:
        """Return the documents of rows in the given order; each row must have one."""
        found = [self._encoded[row].document for row in rows.tolist()]
        return [document for document in found if document is not None]


def encode_in_parts(
    rows: Iterable[Conversation], tokenizer: ChatTokenizer, encoding: Encoding
) -> Iterator[list[EncodedRow]]:
    """Encode rows part by part, with only one part in memory.

    Raises:
        DataError: when a shortened row cannot be rendered.
    """
    for part in _parts(rows):
        yield encode_part(part, tokenizer, encoding)


def _parts(rows: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    part: list[Conversation] = []
    size = 0
    for row in rows:
        part.append(row)
        size += sum(len(message["content"]) for message in row.messages)
        if len(part) >= _ROWS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def encode_part(
    rows: Sequence[Conversation], tokenizer: ChatTokenizer, encoding: Encoding
) -> list[EncodedRow]:
    """Encode rows, and shorten rows that are too long if the settings ask for it.

    Raises:
        DataError: when a shortened row cannot be rendered.
    """
    documents, problems = tokenizer.encode_rows(rows, loss_on=encoding.loss_on)
    why = iter(problems)
    longer = [
        i for i, d in enumerate(documents) if d is not None and len(d.tokens) > encoding.limit
    ]
    shorter: dict[int, Document | None] = dict.fromkeys(longer)
    if encoding.too_long in (LEFT, RIGHT):
        found = shorten(
            [rows[i] for i in longer],
            functools.partial(tokenizer.encode_conversations, loss_on=encoding.loss_on),
            limit=encoding.limit,
            side=encoding.too_long,
            loss_on=encoding.loss_on,
        )
        shorter = dict(zip(longer, found, strict=True))
    encoded = []
    for i, (row, document) in enumerate(zip(rows, documents, strict=True)):
        if document is None:
            encoded.append(EncodedRow(None, row.source, 0, UNRENDERED, next(why)))
            continue
        flags = 0
        if i in shorter:
            flags = TOO_LONG if shorter[i] is None else SHORTENED
        kept = shorter.get(i, document)
        encoded.append(EncodedRow(kept, row.source, len(document.tokens), flags))
    return encoded
