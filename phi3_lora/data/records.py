"""Rows of chat files as conversations, with every bad row named by file and line.

Formats: JSONL with `messages` (role, content), or with `prompt` and `completion`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora.errors import DataError, listing

ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: its messages and where it stands."""

    messages: tuple[Message, ...]
    source: str
    """file:line."""
    weights: tuple[bool | None, ...] | None = None
    """Whether each message is in the loss; None (of one or of all) leaves it to the settings."""
    whole: bool = False
    """Plain text: one message, whose every token is in the loss."""


class RowError(ValueError):
    """A row that cannot be used; the message says why."""


def read_conversations(path: Path) -> list[Conversation]:
    """Every conversation of a JSONL file.

    Raises:
        DataError: when the file is missing or empty, or a row is bad; all bad rows are counted
            and the first ones are listed with file:line.
    """
    found, problems = [], []
    for number, line in _lines(path):
        source = f"{path}:{number}"
        try:
            found.append(Conversation(parse_row(line), source))
        except RowError as problem:
            problems.append(f"{source}: {problem}")
    if problems:
        raise DataError(
            listing(f"{len(problems):,} bad row(s) in {path}; correct or remove them:", problems)
        )
    if not found:
        raise DataError(f"{path} has no rows: each line must hold a JSON object with `messages`")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; a byte order mark and CRLF are accepted."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no such data file: {path}") from None
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror}") from None
    if raw[:2] == b"\x1f\x8b":
        raise DataError(f"{path} is gzip-compressed: unpack it first (gunzip)")
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as cause:
            raise DataError(
                f"{path}:{number}: not UTF-8 (byte {cause.start + 1} of the line): "
                "save the file as UTF-8"
            ) from None
        if text.strip():
            yield number, text


def parse_row(line: str) -> tuple[Message, ...]:
    """The messages of one JSON line.

    Raises:
        RowError: when the line is not JSON or is no usable conversation.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise RowError(f"not JSON: {cause}") from None
    if not isinstance(row, dict):
        raise RowError(f"must be a JSON object, got {type(row).__name__}")
    if "messages" in row:
        messages = _check_messages(row["messages"])
    elif "prompt" in row and "completion" in row:
        messages = _check_messages(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        )
    else:
        keys = ", ".join(sorted(row)) or "none"
        raise RowError(f"needs `messages`, or `prompt` and `completion`; its keys: {keys}")
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("has no assistant turn: there is nothing to learn")
    return messages


def _check_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowError("`messages` must be a list with at least one message")
    messages = tuple(_check_message(i, message) for i, message in enumerate(value, start=1))
    roles = [m["role"] for m in messages]
    if "system" in roles[1:]:
        raise RowError(f"message {roles.index('system', 1) + 1}: a system message must come first")
    spoken = [r for r in roles if r != "system"]
    for i, (before, role) in enumerate(zip([None, *spoken], spoken, strict=False), start=1):
        if role == before or (before is None and role == "assistant"):
            raise RowError(f"turn {i}: roles must alternate, user first; got {' '.join(roles)}")
    return messages


def _check_message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"message {number} must be an object, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError(f"message {number}: role {role!r} is not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RowError(
            f"message {number} ({role}): content must be a string, got {type(content).__name__}"
        )
    if role == "assistant" and not content.strip():
        raise RowError(f"message {number}: the assistant's answer is empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"message {number} ({role}): holds half a surrogate pair") from None
    return {"role": role, "content": content}
