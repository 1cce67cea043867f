"""Reading of sources as conversations; every bad row has its file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from phi3_lora.data.options import OnBadRow
from phi3_lora.data.rows.conversation import BadRow, Conversation, RawRow, RowError
from phi3_lora.data.rows.formats import RowReader
from phi3_lora.data.sources.bad_rows import TRAINING, BadRows
from phi3_lora.data.sources.in_memory import Data, as_source
from phi3_lora.data.sources.source import Part, Source, parts_of
from phi3_lora.errors import DataError

Named = Data | Sequence[Source]
"""One source in any form, or several sources."""


@dataclass(slots=True)
class Rows:
    """Conversations of sources, with counts and notes."""

    conversations: list[Conversation] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Number of conversations of each source, in order."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user on rows that were left out and on formats."""


class ReadRow(NamedTuple):
    """A row as its file holds it, and the conversation or problem found in it."""

    place: str
    """file:line."""
    raw: RawRow
    found: Conversation | BadRow


class PartReader:
    """Reader of one part of a source; the first usable row decides the format."""

    def __init__(self, source: Source, part: Part) -> None:
        """Start before the first row."""
        self.source = source
        self.name = part.name
        self._part = part
        self._reader = RowReader(source.format, source.columns)

    @property
    def format(self) -> str:
        """The format of the rows; auto until the first usable row."""
        return self._reader.name

    def rows(self) -> Iterator[ReadRow]:
        """Read every row, usable or not."""
        for raw in self._part.rows():
            place = f"{self.name}:{raw.line}"
            yield ReadRow(place, raw, self._found(raw, place))

    def _found(self, raw: RawRow, place: str) -> Conversation | BadRow:
        if raw.problem is not None:
            return BadRow(place, raw.problem, raw.kind)
        try:
            return self._reader.read(raw.value, place)
        except RowError as cause:
            return BadRow(place, str(cause), cause.kind)

    def notes(self) -> list[str]:
        """Return notes for the user on the rows that were read."""
        return [f"{self.name}: {note}" for note in self._reader.notes()]


def read_parts(sources: Sequence[Source]) -> Iterator[PartReader]:
    """Open every part of sources in order.

    Raises:
        DataError: when a source does not exist.
    """
    for source in sources:
        for part in parts_of(source):
            yield PartReader(source, part)


def iterate_rows(named: Named, notes: list[str] | None = None) -> Iterator[Conversation | BadRow]:
    """Read every row of sources in order, one at a time: a conversation or a bad row.

    Args:
        named: a file, a folder, a pattern, a data set, rows in memory, or several sources.
        notes: receives notes for the user on the formats of files.

    Raises:
        DataError: when a source does not exist, or a file is damaged.
    """
    for part in read_parts(as_sources(named)):
        for row in part.rows():
            yield row.found
        if notes is not None:
            notes += part.notes()


def read_conversations(named: Named) -> list[Conversation]:
    """Read every conversation of sources; refuse bad rows.

    Args:
        named: the sources, as in iterate_rows.

    Raises:
        DataError: as in read_rows.
    """
    return read_rows(named).conversations


def read_rows(named: Named, *, on_bad_row: OnBadRow = "error") -> Rows:
    """Read every row of sources into memory.

    Args:
        named: the sources, as in iterate_rows.
        on_bad_row: error, or skip, which leaves bad rows out and notes them.

    Raises:
        DataError: when there is no usable row, a file is missing or damaged, or a row is bad. The
            message counts all bad rows and lists the first with file:line.
    """
    rows = Rows()
    rows.conversations = list(usable_rows(named, rows, on_bad_row=on_bad_row))
    return rows


def usable_rows(named: Named, rows: Rows, *, on_bad_row: OnBadRow) -> Iterator[Conversation]:
    """Read the conversations of sources one at a time, for data that does not fit into memory.

    Args:
        named: the sources, as in iterate_rows.
        rows: receives counts and notes after the last row.
        on_bad_row: error or skip, as in read_rows; with error, rows after a bad row are only
            counted.

    Raises:
        DataError: as in read_rows, after the last row.
    """
    bad = BadRows(on_bad_row, TRAINING)
    num_good = 0
    sources = as_sources(named)
    for source in sources:
        before = num_good
        for row in iterate_rows(source, rows.notes):
            if isinstance(row, BadRow):
                bad.add(row)
                continue
            num_good += 1
            if not bad.must_be_refused:
                yield row
        rows.counts.append(num_good - before)
    names = ", ".join(map(str, sources))
    bad.refuse(f"in {names}")
    rows.notes += bad.notes(num_good, names)
    if not num_good:
        raise DataError("\n".join([_without_rows(names, bad.count), *rows.notes]))


def as_sources(named: Named) -> Sequence[Source]:
    """Return the argument as a list of sources.

    Raises:
        DataError: when the argument is neither a name nor rows.
    """
    if isinstance(named, (list, tuple)):
        sources = [one for one in named if isinstance(one, Source)]
        if len(sources) == len(named):
            return sources
    # Anything but a list of sources is one name, or rows in memory.
    return [as_source(cast(Data, named))]


def check_any(rows: Sequence[object], sources: Sequence[Source]) -> None:
    """Check that at least one row was read, usable or not.

    Raises:
        DataError: when there is no row.
    """
    if not rows:
        raise DataError(_without_rows(", ".join(map(str, sources)), 0))


def _without_rows(names: str, num_bad: int) -> str:
    if num_bad:
        return f"{names}: no usable row is left"
    name = names or "the list"
    return f"{name} has no rows: each must hold `messages`, or the keys of another format"
