"""Formats of rows: detection of the format, and reading of the conversation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from phi3_lora.data.rows.conversation import (
    BAD,
    EMPTY,
    Conversation,
    Message,
    RowError,
    Turns,
    check_json,
    check_text,
    check_turns,
    named,
    shown,
)

Row = Mapping[str, Any]


class Format(NamedTuple):
    """One way to write a row."""

    needs: tuple[str, ...]
    """Required keys; detection takes the first format whose keys are all present."""
    read: Callable[[Row], tuple[Turns, bool]]
    """Return the checked turns, and True if they are plain text."""
    is_chat: bool
    """True if one file may mix rows of this format with rows of the other chat formats."""


def _messages(row: Row) -> tuple[Turns, bool]:
    return _chat(row, "messages")


def _sharegpt(row: Row) -> tuple[Turns, bool]:
    return _chat(row, "conversations")


def _chat(row: Row, key: str) -> tuple[Turns, bool]:
    value = row[key]
    # A table cannot nest lists: its cell holds the list as JSON.
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json_cell(key, value)
    return _with_system(row, check_turns(value, key)), False


def _prompt_completion(row: Row) -> tuple[Turns, bool]:
    prompt, completion = row["prompt"], row["completion"]
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    answer = (
        completion
        if isinstance(completion, list)
        else [{"role": "assistant", "content": completion}]
    )
    turns = check_turns([*asked, *answer], "prompt and completion")
    # Only the completion is learnt. Source: TRL, SFTTrainer.
    weights = [
        False if i < len(asked) and m["role"] == "assistant" else own
        for i, (m, own) in enumerate(
            zip(turns.messages, turns.weights or [None] * len(turns.messages), strict=True)
        )
    ]
    own_weights = None if set(weights) == {None} else tuple(weights)
    return _with_system(row, Turns(turns.messages, own_weights)), False


def _alpaca(row: Row) -> tuple[Turns, bool]:
    """Read instruction, input and output; input, system text and earlier turns are optional.

    A line end joins instruction and input; history is a list of pairs.

    Source: LLaMA-Factory, data/README.md.
    """
    turns = []
    history = row.get("history")
    if isinstance(history, str) and history.strip():
        history = _json_cell("history", history)
    for number, pair in enumerate(history or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history: entry {number} must be a pair of question and answer")
        turns += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    instruction, extra = row["instruction"], row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"`input` must be a string, got {type(extra).__name__}")
    if extra and extra.strip() and isinstance(instruction, str):
        instruction = f"{instruction}\n{extra}"
    turns += [
        {"role": "user", "content": instruction},
        {"role": "assistant", "content": row["output"]},
    ]
    return _with_system(row, check_turns(turns)), False


def _text(row: Row) -> tuple[Turns, bool]:
    text = row["text"]
    if not isinstance(text, str):
        raise RowError(f"`text` must be a string, got {type(text).__name__}")
    if not text.strip():
        raise RowError("`text` is empty: there is nothing to learn", EMPTY)
    check_text("`text`", text)
    return Turns(({"role": "assistant", "content": text},)), True


def _classification(row: Row) -> tuple[Turns, bool]:
    """Read a text and its label; the label becomes the assistant's answer."""
    label = row["label"]
    if isinstance(label, bool):
        label = "true" if label else "false"
    if isinstance(label, float) and not math.isfinite(label):
        label = None
    if isinstance(label, (int, float)):
        label = f"{label:g}" if isinstance(label, float) else str(label)
    if not isinstance(label, str) or not label.strip():
        kind = EMPTY if isinstance(label, str) or label is None else BAD
        raise RowError(f"`label` must be a string or a number, got {shown(row['label'])}", kind)
    if not isinstance(row["text"], str):
        raise RowError(f"`text` must be a string, got {type(row['text']).__name__}")
    turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": label}]
    return _with_system(row, check_turns(turns)), False


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages, is_chat=True),
    "sharegpt": Format(("conversations",), _sharegpt, is_chat=True),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, is_chat=True),
    "alpaca": Format(("instruction", "output"), _alpaca, is_chat=False),
    "classification": Format(("text", "label"), _classification, is_chat=False),
    "text": Format(("text",), _text, is_chat=False),
}
"""Name -> format, in the order of detection."""
COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output"),
    *("text", "label", "system", "history", "tools"),
)
"""All keys of rows that any format reads."""
_OPTIONAL = ("input", "system", "history", "tools")
LONGEST_ROW = 1 << 23
"""Characters that a row may have: 64 for each token of the longest context (131,072).

The tokenizer needs gigabytes for a longer text."""
_TRUTHS = (True, False, 0, 1, "0", "1", "true", "false")
"""Labels that rate an answer as good or bad."""


class RowReader:
    """Reader of the rows of one file; the first usable row decides the file's format."""

    def __init__(self, name: str = "auto", columns: Mapping[str, str] | None = None) -> None:
        """Start before the first row.

        Args:
            name: a key of FORMATS, or auto.
            columns: our key -> the row's key, where the two differ.
        """
        self.name = name
        self._is_fixed = name != "auto"
        self._columns = dict(columns or {})
        self._theirs = set(self._columns.values())
        self._first = ""
        self._unread: set[str] = set()

    def read(self, value: Any, source: str) -> Conversation:
        """Read the conversation of a row.

        Args:
            value: the row as its file holds it.
            source: file:line.

        Raises:
            RowError: when the row cannot be used.
        """
        if not isinstance(value, Mapping):
            raise RowError(f"must be a JSON object, got {type(value).__name__}")
        row = self._named(value)
        name = self._format(row, EMPTY if self._has_null(value) else BAD)
        turns, whole = FORMATS[name].read(row)
        size = sum([len(message["content"]) for message in turns.messages])
        if size > LONGEST_ROW:
            raise RowError(
                f"has {size:,} characters, more than the limit of {LONGEST_ROW:,}: split it into "
                "several rows"
            )
        if self.name == "auto":
            self.name, self._first = name, source
        if whole:
            self._unread |= row.keys() - {"text"}
        return Conversation(turns.messages, source, turns.weights, whole)

    def notes(self) -> list[str]:
        """Return notes for the user on the rows that were read."""
        if self.name != "text":
            return []
        unread = f"; not read: {named(sorted(self._unread))}" if self._unread else ""
        return [f"rows of plain text: every token is in the loss{unread}"]

    def _named(self, value: Row) -> Row:
        """Return the row with our keys and without null values."""
        if not self._columns and None not in value.values():
            return value
        present = {k: v for k, v in value.items() if v is not None}
        if not self._columns:
            return present
        missing = sorted(
            theirs
            for ours, theirs in self._columns.items()
            if ours not in _OPTIONAL and theirs not in value
        )
        if missing:
            raise RowError(
                f"has no column {', '.join(missing)} (data.columns); its keys: {_keys(value)}"
            )
        rest = {
            k: v for k, v in present.items() if k not in self._theirs and k not in self._columns
        }
        return rest | {k: present[v] for k, v in self._columns.items() if v in present}

    def _has_null(self, value: Row) -> bool:
        """Return whether a key that a format requires is null."""
        if None not in value.values():
            return False
        theirs = (self._columns.get(key, key) for key in COLUMNS if key not in _OPTIONAL)
        return any(key in value and value[key] is None for key in theirs)

    def _format(self, row: Row, kind: str) -> str:
        """Return the format of a row; `kind` is the kind of error when the row has no format."""
        if self._is_fixed:
            missing = [key for key in FORMATS[self.name].needs if key not in row]
            if missing:
                raise RowError(
                    f"is not {self.name}: `{'`, `'.join(missing)}` missing or null; "
                    f"its keys: {_keys(row)}",
                    kind,
                )
            return self.name
        _refuse_preference(row)
        found = next((n for n, f in FORMATS.items() if all(k in row for k in f.needs)), None)
        if found != self.name:
            self._refuse_incomplete(row)
        if found is None:
            raise RowError(
                "needs `messages`, `conversations`, `prompt` and `completion`, `instruction` and "
                f"`output`, or `text`; its keys: {_keys(row)}; rename with data.columns",
                kind,
            )
        if self.name in ("auto", found) or (FORMATS[self.name].is_chat and FORMATS[found].is_chat):
            return found
        raise RowError(
            f"is {found}, but the file is {self.name} because of {self._first}: split the file, or "
            "set data.format"
        )

    def _refuse_incomplete(self, row: Row) -> None:
        """Refuse a row that has only some of the required keys; an empty cell counts as absent."""
        needs = () if self.name == "auto" else FORMATS[self.name].needs
        missing = [key for key in needs if key not in row]
        if missing and len(missing) < len(needs):
            raise RowError(
                f"`{'`, `'.join(missing)}` is missing or empty; the file is {self.name} because of "
                f"{self._first}",
                EMPTY,
            )


def _refuse_preference(row: Row) -> None:
    if "chosen" in row and "rejected" in row:
        key = "messages" if isinstance(row["chosen"], list) and "prompt" not in row else None
        raise RowError(
            "is preference data (chosen and rejected), which cannot be trained on yet; to "
            f"fine-tune on the chosen answers set data.columns to {{{key or 'completion'}: chosen}}"
        )
    label = row.get("label")
    judged = label.lower() if isinstance(label, str) else label
    if "completion" in row and isinstance(judged, (str, int)) and judged in _TRUTHS:
        raise RowError(
            "is preference data (a completion with its label, as KTO takes it), which cannot be "
            "trained on yet; to fine-tune on the good answers keep the rows whose label is true, "
            "and leave out `label`"
        )


def _with_system(row: Row, turns: Turns) -> Turns:
    """Add the row's `system` text and `tools` to the system message."""
    if "system" not in row and "tools" not in row:
        return turns
    system, tools = row.get("system"), _tools(row.get("tools"))
    if system is not None and not isinstance(system, str):
        raise RowError(f"`system` must be a string, got {type(system).__name__}")
    if not (system and system.strip()) and tools is None:
        return turns
    messages, weights = turns.messages, turns.weights
    if messages[0]["role"] == "system":
        if system and system.strip():
            raise RowError("has a system message and `system`: keep one of them")
    else:
        check_text("`system`", system or "")
        first: Message = {"role": "system", "content": system or ""}
        messages = (first, *messages)
        weights = None if weights is None else (None, *weights)
    if tools is not None:
        messages = ({**messages[0], "tools": tools}, *messages[1:])
    return Turns(messages, weights)


def _tools(value: Any) -> str | None:
    """Return the descriptions of a row's tools as JSON text, as templates write it; None if absent.

    Source: microsoft/Phi-4-mini-instruct, README.md, "Tool-enabled function-calling format".
    """
    if isinstance(value, str):
        value = _json_cell("tools", value) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("`tools` must be a list of objects, or that list as JSON text")
    return check_json("`tools`", value)


def _json_cell(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise RowError(f"`{name}` is not JSON: {cause}") from None


def _keys(row: Row) -> str:
    return named(sorted(map(str, row))) or "none"
