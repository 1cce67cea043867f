"""Rows of sources read block by block, for data that no run passes over as a whole."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.documents.encoding import Encoding, InMemory, encode_in_parts
from phi3_lora.data.documents.overlap import DocumentIndex
from phi3_lora.data.documents.selection import Selection, notes_on
from phi3_lora.data.documents.tally import BAD, LEAKED, Tally
from phi3_lora.data.rows.conversation import BadRow, Conversation
from phi3_lora.data.sources.bad_rows import STREAMING, BadRows
from phi3_lora.data.sources.reading import iterate_rows
from phi3_lora.data.sources.source import Source

NAME = "training data"


class Block(NamedTuple):
    """Consecutive rows."""

    number: int
    """Counts from 0."""
    documents: Sequence[Document]
    """Documents of trainable rows, in the order of the rows."""
    tally: Tally
    """The outcomes of the block's rows."""
    rows_hash: str
    """sha256 of all rows of the pass up to the block's last one."""


class Stopped(Exception):
    """Reading stopped because it was asked to."""


@dataclass(frozen=True, slots=True)
class StreamedRows:
    """Rows that can be read in several passes."""

    sources: Sequence[Source]
    tokenizer: ChatTokenizer
    encoding: Encoding
    buffer_size: int
    """Rows in a block."""
    held_out: DocumentIndex = field(default_factory=lambda: DocumentIndex(()))
    """The validation documents; training rows among them are counted."""

    def __str__(self) -> str:
        """Return the name of the rows in messages."""
        return ", ".join(map(str, self.sources))

    def notes_on(self, tally: Tally) -> list[str]:
        """Return a note for the user on each outcome of the rows that were read."""
        return notes_on(tally, f"{NAME}, of {tally.num_rows:,} rows read", self.encoding)


class StreamPass:
    """One pass over the rows, from the first one on."""

    def __init__(self, rows: StreamedRows) -> None:
        """Begin at the first row."""
        self._of = rows
        self.is_stopped: Callable[[], bool] = lambda: False
        """Called at each row; reading stops when it returns True."""
        self._notes: list[str] = []
        self._rows = mixed_rows(rows.sources, self._notes)
        self._digest = hashlib.sha256()
        self.number = 0
        """The number of the next block."""

    def read(self) -> Block | None:
        """Read the next block; return None after the last one.

        Raises:
            DataError: when a source does not exist or is damaged; when a row is bad or too long,
                and that is to be an error.
            Stopped: when is_stopped returned True.
        """
        rows = self._next()
        if not rows:
            return None
        of = self._of
        good = [row for row in rows if isinstance(row, Conversation)]
        bad = BadRows(of.encoding.on_bad_row, STREAMING)
        for row in rows:
            if isinstance(row, BadRow):
                bad.add(row)
        # Noted when they are met: the end of their file may never be read.
        plain = dict.fromkeys(row.source.rpartition(":")[0] for row in good if row.whole)
        self._notes += [f"{name}: rows of plain text: every token is in the loss" for name in plain]
        first = (self.number - 1) * of.buffer_size + 1
        place = f"rows {first:,} to {first + len(rows) - 1:,} of {of}"
        bad.refuse(f"among {place}")
        parts = encode_in_parts(good, of.tokenizer, of.encoding)
        encoded = InMemory([*itertools.chain.from_iterable(parts)])
        selection = Selection(encoded, of.encoding, ())
        index, tally = selection.choose(np.arange(len(good)), f"{NAME}, {place}")
        tally += Tally(num_rows=bad.count)
        tally = tally.plus(BAD, bad.count, bad.first)
        documents = encoded.documents(index)
        shared = [document.source for document, _ in of.held_out.among(documents)]
        tally = tally.plus(LEAKED, len(shared), shared[:1])
        return Block(self.number - 1, documents, tally, self._digest.hexdigest())

    def skip(self) -> bool:
        """Read past the next block; return False after the last one.

        Raises:
            DataError: when a source does not exist or is damaged.
            Stopped: when is_stopped returned True.
        """
        return bool(self._next())

    def notes(self) -> list[str]:
        """Return the notes on formats since the last call."""
        notes, self._notes[:] = [*self._notes], []
        return notes

    def _next(self) -> list[Conversation | BadRow]:
        rows = []
        for row in itertools.islice(self._rows, min(self._of.buffer_size, sys.maxsize)):
            if self.is_stopped():
                raise Stopped
            rows.append(row)
            self._digest.update(_content(row))
        self.number += bool(rows)
        return rows


def mixed_rows(
    sources: Sequence[Source], notes: list[str] | None = None
) -> Iterator[Conversation | BadRow]:
    """Read rows of sources in turn, each source as often as its weight says, until all have ended.

    Args:
        sources: what to read; one that ends drops out.
        notes: gets what the user should know of a file's format.

    Raises:
        DataError: when a source does not exist or is damaged.

    Source: stride scheduling, Waldspurger and Weihl (1995), MIT/LCS/TM-528.
    """
    rows = [iterate_rows(source, notes) for source in sources]
    # When each source is due next; the first of those that are due at once goes first.
    due = [(1 / source.weight, i) for i, source in enumerate(sources)]
    heapq.heapify(due)
    while due:
        time, i = heapq.heappop(due)
        row = next(rows[i], None)
        if row is not None:
            yield row
            heapq.heappush(due, (time + 1 / sources[i].weight, i))


def _content(row: Conversation | BadRow) -> bytes:
    """Return the content of a row as bytes, without its place."""
    if isinstance(row, BadRow):
        return b"bad row\n"
    return (json.dumps([row.messages, row.weights, row.whole]) + "\n").encode()
