"""Reading of sources block by block, for data that is too large to read before a run."""

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
    """Encoded rows that follow each other in the stream."""

    number: int
    """Counts from 0."""
    documents: Sequence[Document]
    """Documents of the trainable rows, in the order of the rows."""
    tally: Tally
    """The outcomes of the block's rows."""
    rows_hash: str
    """sha256 of all rows of the pass up to the end of the block."""


class Stopped(Exception):
    """Signal that StreamPass.is_stopped asked to stop reading."""


@dataclass(frozen=True, slots=True)
class StreamedRows:
    """Rows to read in one or more passes."""

    sources: Sequence[Source]
    tokenizer: ChatTokenizer
    encoding: Encoding
    buffer_size: int
    """Number of rows in a block."""
    held_out: DocumentIndex = field(default_factory=lambda: DocumentIndex(()))
    """The validation documents; training rows that are among them are counted."""

    def __str__(self) -> str:
        """Return the name of the rows in messages."""
        return ", ".join(map(str, self.sources))

    def notes_on(self, tally: Tally) -> list[str]:
        """Return a note for the user on each outcome of rows that were read."""
        return notes_on(tally, f"{NAME}, of {tally.num_rows:,} rows read", self.encoding)


class StreamPass:
    """One pass over the rows, from the first row on."""

    def __init__(self, rows: StreamedRows) -> None:
        """Begin at the first row."""
        self._of = rows
        self.is_stopped: Callable[[], bool] = lambda: False
        """Function that is called at each row; reading stops when it returns True."""
        self._notes: list[str] = []
        self._rows = mixed_rows(rows.sources, self._notes)
        self._digest = hashlib.sha256()
        self.number = 0
        """Number of the next block."""

    def read(self) -> Block | None:
        """Read the next block; return None after the last one.

        Raises:
            DataError: when a source does not exist or is damaged, or when a row is bad or too long
                and the encoding makes that an error.
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
        # Plain text is noted at once: the end of its file may never be read.
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
        """Return the notes on formats that came since the last call."""
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
    """Read rows from several sources in turn, in proportion to the weights of the sources.

    Args:
        sources: sources to read; reading ends after the last row of all.
        notes: receives notes for the user on the formats of files.

    Raises:
        DataError: when a source does not exist or is damaged.

    Source: stride scheduling, Waldspurger and Weihl (1995), MIT/LCS/TM-528.
    """
    rows = [iterate_rows(source, notes) for source in sources]
    # The time at which each source is due; at equal times the earlier source comes first.
    due = [(1 / source.weight, i) for i, source in enumerate(sources)]
    heapq.heapify(due)
    while due:
        time, i = heapq.heappop(due)
        row = next(rows[i], None)
        if row is not None:
            yield row
            heapq.heappush(due, (time + 1 / sources[i].weight, i))


def _content(row: Conversation | BadRow) -> bytes:
    """Return the content of a row, without its place, as bytes to hash."""
    if isinstance(row, BadRow):
        return b"bad row\n"
    return (json.dumps([row.messages, row.weights, row.whole]) + "\n").encode()
