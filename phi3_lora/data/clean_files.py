"""Cleaned rows as files: what is left, and what was done, so that each change can be taken back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_lora.data.cleaning import Change, Cleaned
from phi3_lora.data.conversation import Conversation
from phi3_lora.data.splitting import TRAIN_NAME
from phi3_lora.storage import replace_folder, write_bytes

CHANGES_NAME = "changes.jsonl"


def row_value(row: Conversation) -> dict[str, Any]:
    """A conversation as one JSON object, which is read as the same conversation again."""
    if row.whole:
        return {"text": row.messages[0]["content"]}
    messages = []
    for i, message in enumerate(row.messages):
        weight = None if row.weights is None else row.weights[i]
        messages.append({**message, **({} if weight is None else {"weight": int(weight)})})
    return {"messages": messages}


def write_cleaned(folder: Path, cleaned: Cleaned) -> None:
    """Write train.jsonl, and changes.jsonl with each changed row before and after.

    Raises:
        StorageError: when it cannot be written.
    """

    def fill(part: Path) -> None:
        write_bytes(part / TRAIN_NAME, _lines([row_value(row) for row in cleaned.rows]))
        write_bytes(part / CHANGES_NAME, _lines([_change_value(c) for c in cleaned.changes]))

    replace_folder(folder, fill)


def _change_value(change: Change) -> dict[str, Any]:
    return {
        "source": change.source,
        "step": change.step,
        "message": change.message,
        "before": row_value(change.before),
        "after": None if change.after is None else row_value(change.after),
    }


def _lines(values: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)
