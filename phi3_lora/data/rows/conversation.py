"""Conversations with checked turns: the result of reading a row in any format."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Name of a speaker in data sets -> role.

Source: axolotl, prompt_strategies/chat_template.py; LLaMA-Factory, data/README.md.
"""
_FOLLOWS = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant"),
}
"""Speaker -> roles that may follow. None is the start of a row after any system message; call is an
assistant message with tool calls."""
BAD, EMPTY, ENCODING = "bad-row", "empty", "encoding"
"""Kinds of problems: a text is missing (EMPTY), a text is damaged (ENCODING), any other (BAD)."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_MOST_NAMED = 12
ToolCall = dict[str, Any]
"""One tool call in the JSON form of the row."""
Message = dict[str, Any]
"""`role` and `content` (strings); `tool_calls` of an assistant; `tools` of a system message."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one row and the place of the row."""

    messages: tuple[Message, ...]
    source: str
    """file:line."""
    weights: tuple[bool | None, ...] | None = None
    """For each message: True if it is in the loss, False if not, None if the settings decide.

    None in place of the tuple: the settings decide for every message.
    """
    whole: bool = False
    """True for plain text: the row has one message, and all its tokens are in the loss."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    source: str
    """file:line."""
    problem: str
    kind: str = BAD

    def __str__(self) -> str:
        """Return the place and the problem, as messages list them."""
        return f"{self.source}: {self.problem}"


class RawRow(NamedTuple):
    """The value in one line of a file, or the problem that prevents reading it."""

    line: int
    """Line number from 1; row number from 1 in Parquet files and data sets."""
    value: Any
    problem: str | None = None
    kind: str = BAD
    """The kind of the problem."""


class RowError(ValueError):
    """Error for a row that cannot be used; the message gives the reason."""

    def __init__(self, problem: str, kind: str = BAD) -> None:
        """Store the problem and its kind."""
        super().__init__(problem)
        self.kind = kind


def shown(value: Any) -> str:
    """Return a value of a row for a message: short, on one line, without control characters."""
    return _SHORT.repr(value)


def named(words: Sequence[str], between: str = ", ") -> str:
    """List the first words of a row for a message; long or unprintable words go through `shown`."""
    first = [w if w.isprintable() and len(w) <= 60 else shown(w) for w in words[:_MOST_NAMED]]
    rest = len(words) - len(first)
    return between.join(first) + (f" and {rest:,} more" if rest else "")


@dataclass(frozen=True, slots=True)
class Turns:
    """The checked messages of one row, and the weights that the row gives them."""

    messages: tuple[Message, ...]
    weights: tuple[bool | None, ...] | None = None


def check_turns(value: Any, name: str = "messages") -> Turns:
    """Check a list of turns and return its messages and weights.

    Args:
        value: the list in the row; `from` and `value` are read as `role` and `content`.
        name: the key of the list, for messages.

    Raises:
        RowError: when the turns cannot be used.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise RowError(f"`{name}` must be a list with at least one message")
    messages = tuple(_message(i, turn) for i, turn in enumerate(value, start=1))
    _check_order([m["role"] for m in messages], ["tool_calls" in m for m in messages])
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("has no assistant turn: there is nothing to learn")
    if not any("weight" in turn for turn in value):
        return Turns(messages)
    weights = tuple(_weight(i, turn) for i, turn in enumerate(value, start=1))
    return Turns(messages, None if set(weights) == {None} else weights)


def _check_order(roles: Sequence[str], calls: Sequence[bool]) -> None:
    """Check the order of roles: system, then user and assistant in turn; tool follows a call."""
    if "system" in roles[1:]:
        raise RowError(f"message {roles.index('system', 1) + 1}: a system message must come first")
    before, turn = None, 0
    for role, is_call in zip(roles, calls, strict=True):
        if role == "system":
            continue
        turn += 1
        allowed = _FOLLOWS[before]
        if role not in allowed:
            rule = (
                f"a tool call must be followed by {' or '.join(allowed)}"
                if before in ("call", "tool")
                else "a tool message must follow an assistant's tool_calls"
                if role == "tool"
                else "roles must alternate, user first"
            )
            raise RowError(f"turn {turn}: {rule}; got {named(roles, ' ')}")
        before = "call" if is_call else role
    # A row may end with a call: the call is then the answer to learn.
    if before == "tool":
        raise RowError(f"ends with a tool message, without an answer; got {named(roles, ' ')}")


def _message(number: int, turn: Any) -> Message:
    if _is_simple(turn):
        return {"role": turn["role"], "content": turn["content"]}
    if not isinstance(turn, Mapping):
        raise RowError(f"message {number} must be an object, got {type(turn).__name__}")
    speaker = _first(turn, "role", "from")
    role = _ROLE_OF.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"message {number}: role {shown(speaker)} is not one of {', '.join(ROLES)}")
    content = _first(turn, "content", "value")
    message: Message = {"role": role}
    calls = _first(turn, "tool_calls")
    if speaker == "function_call":
        calls, content = _call_in_text(number, content), None
    if calls is not None and (role != "assistant" or calls != []):
        message["tool_calls"] = _tool_calls(number, role, calls)
    is_call = "tool_calls" in message
    message["content"] = _content(f"message {number} ({role})", content, may_miss=is_call)
    if role == "assistant" and not is_call and not message["content"].strip():
        raise RowError(f"message {number}: the assistant's answer is empty", EMPTY)
    if role == "tool":
        message |= {k: turn[k] for k in ("name", "tool_call_id") if isinstance(turn.get(k), str)}
    return message


def _is_simple(turn: Any) -> bool:
    """Return whether a turn can skip the full checks, which take five times as long."""
    if type(turn) is not dict or len(turn) != 2:
        return False
    role, content = turn.get("role"), turn.get("content")
    return (
        type(content) is str
        and content.isascii()
        and (role == "user" or role == "system" or (role == "assistant" and not content.isspace()))
        and content != ""
    )


def _content(label: str, value: Any, *, may_miss: bool) -> str:
    """Return a content as one string; a list of text parts is joined."""
    if value is None and may_miss:
        return ""
    if isinstance(value, list):
        value = "".join(_part(label, i, part) for i, part in enumerate(value, start=1))
    if not isinstance(value, str):
        kind = EMPTY if value is None else BAD
        wanted = "content must be a string or a list of text parts"
        got = "null" if value is None else type(value).__name__
        raise RowError(f"{label}: {wanted}, got {got}", kind)
    check_text(label, value)
    return value


def _part(label: str, number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(
            f"{label}: content part {number} is of type {shown(kind)}; only text is trained"
        )
    if not isinstance(text, str):
        raise RowError(
            f"{label}: `text` of content part {number} must be a string, got {type(text).__name__}"
        )
    return text


def check_text(label: str, text: str) -> None:
    """Check that UTF-8 can encode a text.

    Raises:
        RowError: when the text holds half a surrogate pair, which a broken escape leaves behind.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{label}: holds half a surrogate pair", ENCODING) from None


def _tool_calls(number: int, role: str, calls: Any) -> list[ToolCall]:
    if role != "assistant":
        raise RowError(f"message {number}: only the assistant has tool_calls, not {role}")
    if not isinstance(calls, list):
        raise RowError(
            f"message {number}: tool_calls must be a list of objects, got {type(calls).__name__}"
        )
    for call in calls:
        inner = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise RowError(
                f"message {number}: each of tool_calls must be an object with `function` "
                "{`name`, `arguments`}"
            )
    check_json(f"message {number}: tool_calls", calls)
    return [dict(call) for call in calls]


def _call_in_text(number: int, content: Any) -> list[ToolCall]:
    """Read the calls that a ShareGPT turn of `function_call` holds as JSON.

    Source: LLaMA-Factory, data/README.md.
    """
    try:
        value = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        raise RowError(f"message {number}: a function_call must hold JSON") from None
    calls = value if isinstance(value, list) else [value]
    return [{"type": "function", "function": call} for call in calls]


def check_json(label: str, value: Any) -> str:
    """Return a value as JSON text.

    Raises:
        RowError: when JSON cannot hold the value.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as cause:
        raise RowError(f"{label} cannot be written as JSON: {cause}") from None
    check_text(label, text)
    return text


def _weight(number: int, turn: Mapping[str, Any]) -> bool | None:
    value = turn.get("weight")
    if value is None:
        return None
    if value not in (0, 1):
        raise RowError(f"message {number}: weight must be 0 or 1, got {shown(value)}")
    return bool(value)


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    """Return the first value that is not null; Parquet fills absent keys with null."""
    for name in names:
        if turn.get(name) is not None:
            return turn[name]
    return None
