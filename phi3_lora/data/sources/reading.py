"""Rows of sources as conversations, with every bad row named by file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phi3_lora.data.rows.conversation import BadRow, Conversation, Message, RowError
from phi3_lora.data.rows.formats import RowReader
from phi3_lora.data.sources.source import Source, conversations_of, parts_of
from phi3_lora.errors import MAX_SHOWN, DataError, listing

__all__ = [
    "BadRow",
    "Conversation",
    "Message",
    "RowError",
    "Rows",
    "iterate_rows",
    "read_conversations",
    "read_rows",
]
Named = Path | str | Source | Sequence[Source]


@dataclass(slots=True)
class Rows:
    """What was read."""

    conversations: list[Conversation] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Conversations of each source, in order."""
    notes: list[str] = field(default_factory=list)
    """What was left out and why, for the user."""


def iterate_rows(named: Named, notes: list[str] | None = None) -> Iterator[Conversation | BadRow]:
    """Every row of sources in order, one at a time: a conversation, or why it is none.

    Args:
        named: a file, a folder, a pattern, a data set, or several sources.
        notes: gets what the user should know of a file's format.

    Raises:
        DataError: when a source does not exist, or a file is damaged.
    """
    for source in as_sources(named):
        for part in parts_of(source):
            reader = RowReader(source.format, source.columns)
            yield from conversations_of(part, reader)
            if notes is not None:
                notes += [f"{part.name}: {note}" for note in reader.notes()]


def read_conversations(named: Named) -> list[Conversation]:
    """Every conversation of a file, a folder, a pattern, a data set, or several sources.

    Raises:
        DataError: as read_rows.
    """
    return read_rows(named).conversations


def read_rows(named: Named, *, on_bad_row: str = "error") -> Rows:
    """Every row of sources, in memory.

    Args:
        named: as iterate_rows.
        on_bad_row: error, or skip: leave bad rows out and note them.

    Raises:
        DataError: when there is no usable row, a file is missing or damaged, or a row is bad; all
            bad rows are counted and the first ones are listed with file:line.
    """
    rows = Rows()
    rows.conversations = list(usable_rows(named, rows, on_bad_row=on_bad_row))
    return rows


def usable_rows(named: Named, rows: Rows, *, on_bad_row: str) -> Iterator[Conversation]:
    """The conversations of sources, one at a time; for data that does not fit into memory.

    Args:
        named: as iterate_rows.
        rows: gets counts and notes, after the last row.
        on_bad_row: as read_rows; with error the rows after a bad one are only counted.

    Raises:
        DataError: as read_rows, after the last row.
    """
    num_bad, num_good = 0, 0
    bad: list[BadRow] = []
    sources = as_sources(named)
    for source in sources:
        before = num_good
        for row in iterate_rows(source, rows.notes):
            if isinstance(row, BadRow):
                num_bad += 1
                bad += [row] if num_bad <= MAX_SHOWN else []
                continue
            num_good += 1
            if not num_bad or on_bad_row == "skip":
                yield row
        rows.counts.append(num_good - before)
    names = ", ".join(map(str, sources))
    if num_bad and on_bad_row == "error":
        title = (
            f"{num_bad:,} bad row(s) in {names}; correct or remove them (train and evaluate can "
            "leave them out: --on-bad-row skip):"
        )
        raise DataError(bad_rows_listed(title, bad, num_bad))
    if num_bad:
        title = f"skipped {num_bad:,} bad row(s) of {num_bad + num_good:,} in {names}:"
        rows.notes.append(bad_rows_listed(title, bad, num_bad))
    if not num_good:
        raise DataError("\n".join([_without_rows(names, num_bad), *rows.notes]))


def as_sources(named: Named) -> Sequence[Source]:
    """Sources of what a caller names."""
    if isinstance(named, Source):
        return [named]
    if isinstance(named, (str, Path)):
        return [Source(path=str(named))]
    return named


def bad_rows_listed(title: str, first: Sequence[BadRow], total: int) -> str:
    """One message for bad rows of which only the first ones are at hand."""
    return listing(title, [str(row) for row in first], total=total)


def check_any(rows: Sequence[object], sources: Sequence[Source]) -> None:
    """Check that sources hold rows, usable or not.

    Raises:
        DataError: when there are none.
    """
    if not rows:
        raise DataError(_without_rows(", ".join(map(str, sources)), 0))


def _without_rows(names: str, num_bad: int) -> str:
    if num_bad:
        return f"{names}: no usable row is left"
    return f"{names} has no rows: each must hold `messages`, or the keys of another format"
