"""Reading of rows to clean, and writing of cleaned rows with a list of all changes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_lora.data.options import OnBadRow
from phi3_lora.data.quality.cleaning import Change, Cleaned
from phi3_lora.data.quality.splitting import TRAIN_NAME, as_json, write_lines
from phi3_lora.data.rows.conversation import BadRow, Conversation
from phi3_lora.data.rows.formats import COLUMNS, FORMATS
from phi3_lora.data.sources.bad_rows import REWRITING, BadRows
from phi3_lora.data.sources.reading import read_parts
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import DataError
from phi3_lora.storage.atomic import replace_folder

CHANGES_NAME = "changes.jsonl"
TEXT_NAME = "train-text.jsonl"
"""File of plain-text rows if there are also conversations: one file cannot hold both."""
_OF_ANY = ("system", "tools")
_OF_ALPACA = ("input", "history")
_MISTAKEN = ("messages", "system", "tools", "completion", "chosen", "rejected")
"""Keys that would change the meaning of a row with messages."""
Others = dict[str, dict[str, Any]]
"""file:line -> keys of a row besides its conversation, such as a label or a group."""


def read_for_cleaning(
    sources: Sequence[Source], *, on_bad_row: OnBadRow, notes: list[str]
) -> tuple[list[Conversation], Others]:
    """Read every row of sources, with the keys besides its conversation.

    Args:
        sources: the sources; weights are ignored.
        on_bad_row: error, or skip, which leaves bad rows out and notes them.
        notes: receives notes for the user.

    Raises:
        DataError: when a source does not exist, rows are bad, or no row is left.
    """
    rows: list[Conversation] = []
    others: Others = {}
    bad = BadRows(on_bad_row, REWRITING)
    for part in read_parts(sources):
        for place, raw, found in part.rows():
            if isinstance(found, BadRow):
                bad.add(found)
                continue
            rows.append(found)
            if beside := other_keys(raw.value, part.source):
                others[place] = beside
        notes += part.notes()
    names = ", ".join(map(str, sources))
    bad.refuse(f"in {names}")
    notes += bad.notes(len(rows), names)
    if not rows:
        raise DataError(f"{names}: no rows to clean")
    return rows, others


def other_keys(value: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Return the keys of a row besides its conversation; the label is one of them.

    Args:
        value: the row as its file holds it.
        source: the source of the row, with its format and columns.
    """
    theirs = {ours: source.columns.get(ours, ours) for ours in COLUMNS}
    present = {key for key, item in value.items() if item is not None}
    name = source.format
    if name == "auto":
        fits = (n for n, f in FORMATS.items() if {theirs[k] for k in f.needs} <= present)
        name = next(fits, "")
    needs = FORMATS[name].needs if name else COLUMNS
    read = (*needs, *_OF_ANY, *(_OF_ALPACA if name == "alpaca" else ()))
    # The label stays: a split can be stratified by it, and it does not change messages.
    used = {theirs[key] for key in read if key != "label"}
    return {key: _plain(value[key]) for key in value if key in present and key not in used}


def _plain(value: Any) -> Any:
    """Convert a value to JSON types: Parquet has dates, bytes and NaN."""
    if isinstance(value, (str, int)):
        return value
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def row_value(row: Conversation, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a conversation as one JSON object that reads as the same conversation.

    Args:
        row: the conversation.
        others: other keys of the row; keys that would change its meaning are left out.
    """
    others = others or {}
    if row.whole:
        beside = {k: v for k, v in others.items() if k not in COLUMNS}
        return {"text": row.messages[0]["content"], **beside}
    messages = []
    for i, message in enumerate(row.messages):
        weight = None if row.weights is None else row.weights[i]
        messages.append({**message, **({} if weight is None else {"weight": int(weight)})})
    value: dict[str, Any] = {"messages": messages}
    # Tools go back to the row; the reader makes a system message for them again.
    tools = messages[0].pop("tools", None)
    if tools is not None:
        value["tools"] = json.loads(tools)
        if not messages[0]["content"]:
            del messages[0]
    return value | {k: v for k, v in others.items() if k not in _MISTAKEN}


def write_cleaned(folder: Path, cleaned: Cleaned, others: Others | None = None) -> list[str]:
    """Write the remaining rows, and changes.jsonl with each changed row before and after.

    Args:
        folder: a new or empty folder.
        cleaned: the remaining rows and all changes.
        others: other keys of rows, which are written with them.

    Returns:
        Names of the files of rows: train.jsonl, and train-text.jsonl if rows of plain text are
        mixed with conversations.

    Raises:
        StorageError: when the folder cannot be written.
    """
    beside: Mapping[str, dict[str, Any]] = others or {}
    is_mixed = len({row.whole for row in cleaned.rows}) > 1
    names = [TRAIN_NAME, TEXT_NAME] if is_mixed else [TRAIN_NAME]

    def value_of(row: Conversation) -> dict[str, Any]:
        return row_value(row, beside.get(row.source))

    def change_value(change: Change) -> dict[str, Any]:
        return {
            "source": change.source,
            "step": change.step,
            "message": change.message,
            "before": value_of(change.before),
            "after": None if change.after is None else value_of(change.after),
        }

    def fill(part: Path) -> None:
        for name in names:
            rows = (r for r in cleaned.rows if not is_mixed or r.whole == (name == TEXT_NAME))
            write_lines(part / name, (as_json(value_of(row)) + b"\n" for row in rows))
        changes = (as_json(change_value(c)) + b"\n" for c in cleaned.changes)
        write_lines(part / CHANGES_NAME, changes)

    replace_folder(folder, fill)
    return names
