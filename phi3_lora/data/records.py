"""Rows of sources as conversations, with every bad row named by file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phi3_lora.data.conversation import BadRow, Conversation, Message, RowError
from phi3_lora.data.formats import RowReader
from phi3_lora.data.sources import Source, conversations_of, parts_of
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
    rows, num_bad = Rows(), 0
    bad: list[BadRow] = []
    sources = as_sources(named)
    for source in sources:
        before = len(rows.conversations)
        for row in iterate_rows(source, rows.notes):
            if isinstance(row, Conversation):
                rows.conversations.append(row)
                continue
            num_bad += 1
            if len(bad) < MAX_SHOWN:
                bad.append(row)
        rows.counts.append(len(rows.conversations) - before)
    names = ", ".join(map(str, sources))
    if num_bad and on_bad_row == "error":
        title = (
            f"{num_bad:,} bad row(s) in {names}; correct or remove them (train and evaluate can "
            "leave them out: --on-bad-row skip):"
        )
        raise DataError(bad_rows_listed(title, bad, num_bad))
    if num_bad:
        total = num_bad + len(rows.conversations)
        title = f"skipped {num_bad:,} bad row(s) of {total:,} in {names}:"
        rows.notes.append(bad_rows_listed(title, bad, num_bad))
    if not rows.conversations:
        raise DataError("\n".join([_without_rows(names, num_bad), *rows.notes]))
    return rows


def as_sources(named: Named) -> Sequence[Source]:
    """Sources of what a caller names."""
    if isinstance(named, Source):
        return [named]
    if isinstance(named, (str, Path)):
        return [Source(path=str(named))]
    return named


def bad_rows_listed(title: str, first: Sequence[BadRow], total: int) -> str:
    """One message for bad rows of which only the first ones are at hand."""
    text = listing(title, [str(row) for row in first])
    return text + (f"\n  ... and {total - len(first):,} more" if total > len(first) else "")


def _without_rows(names: str, num_bad: int) -> str:
    if num_bad:
        return f"{names}: no usable row is left"
    return f"{names} has no rows: each must hold `messages`, or the keys of another format"
