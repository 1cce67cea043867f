"""Chat templates: rendering in jinja2's sandbox, and the span of each content in the text.

Source: transformers, utils/chat_template_utils.py (environment, tojson, generation tag).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_lora.data.chat.markers import Span
from phi3_lora.data.chat.template_proof import literals_around, only_places
from phi3_lora.data.rows.conversation import Message
from phi3_lora.errors import ConfigError, DataError, ModelError

_REFUSALS = (TypeError, ValueError, ArithmeticError, RecursionError, LookupError)
"""Exceptions that a template's own code can raise."""
_PRIVATE_USE = range(0xE000, 0xF900)
"""Code points of characters to which no standard gives a meaning."""
_FRAMES_KEPT = 1000


class _GenerationTag(Extension):
    """Jinja extension that ignores {% generation %} tags, which mark answers for other trainers."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads this class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the content of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tools_of(messages: Sequence[Message]) -> Any:
    """Return the tools of a system message, as transformers passes them.

    The templates of Phi-4 read them from the message; most others read the variable `tools`.
    """
    tools = messages[0].get("tools") if messages else None
    return json.loads(tools) if isinstance(tools, str) else tools


class ChatTemplate:
    """A compiled chat template that also locates each message's content in its text."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: jinja2 text.
            special_tokens: name -> text of tokens that the template may use, such as bos_token.

        Raises:
            ModelError: when the template is not valid jinja2.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
            self._only_places = only_places(environment.parse(source))
        except jinja2.TemplateError as cause:
            raise ModelError(f"the chat template is not valid jinja2: {cause}") from None
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._frames: dict[tuple[object, ...], _Frame] = {}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Render a conversation as the model reads it.

        Raises:
            DataError: when the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=_tools_of(messages),
                **self._special_tokens,
            )
        except (jinja2.TemplateError, *_REFUSALS) as cause:
            raise DataError(f"the chat template refuses the conversation: {cause}") from None

    def literals(self, roles: Sequence[str]) -> list[str] | None:
        """Return the text around contents, if it is the same for all contents of these roles.

        Returns:
            The text before, between and after the contents, one more than there are roles; None
            if the text could depend on a content.
        """
        held = self.source + "".join(self._special_tokens.values())
        mark = next((c for c in map(chr, _PRIVATE_USE) if c not in held), None)
        if not self._only_places or mark is None:
            return None
        try:
            return literals_around(self.render, roles, mark)
        except DataError:
            return None

    def content_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """Render a conversation and locate the content of each message in the text.

        The conversation is rendered a second time with a mark in place of each content; the text
        between the marks is the template's own. No marker string is searched for.

        Returns:
            The text, and the span [start, end) of each content. The span is empty for an empty
            content, and for a system message that the template leaves out.

        Raises:
            DataError: when the template leaves out, repeats, moves or rewrites a content.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        literals, order = self._frame(messages, text, add_generation_prompt)
        found = _place(text, literals, [messages[i]["content"] for i in order], order)
        spans, at = [], 0
        for i in range(len(messages)):
            start, at = found.get(i, (at, at))
            spans.append((start, at))
        return text, spans

    def _frame(self, messages: Sequence[Message], text: str, add_generation_prompt: bool) -> _Frame:
        """Find the template's own text around the contents, and the order of the contents."""
        mark = _unused_character(text)
        # An empty content stays empty: a template may test for that.
        marked = [
            {**m, "content": f"{mark}{i}{mark}" if m["content"] else ""}
            for i, m in enumerate(messages)
        ]
        plain = all(len(m) == 2 for m in messages)
        shape = (mark, add_generation_prompt, *((m["role"], m["content"]) for m in marked))
        if plain and shape in self._frames:
            return self._frames[shape]
        rest = self.render(marked, add_generation_prompt=add_generation_prompt)
        parts = re.split(f"{mark}([0-9]+){mark}", rest)
        frame = _Frame(parts[::2], [int(i) for i in parts[1::2]])
        _check_order(messages, frame.order)
        if plain and len(self._frames) < _FRAMES_KEPT:
            self._frames[shape] = frame
        return frame


class _Frame(NamedTuple):
    """The text around contents, and the order of the contents."""

    literals: list[str]
    """The text before, between and after the contents."""
    order: list[int]
    """Index of the message whose content follows each text but the last."""


def _unused_character(text: str) -> str:
    for character in map(chr, _PRIVATE_USE):
        if character not in text:
            return character
    raise DataError("the conversation holds every private-use character: remove one")


def _check_order(messages: Sequence[Message], order: Sequence[int]) -> None:
    for i, message in enumerate(messages):
        times = order.count(i)
        if times > 1:
            raise DataError(f"the chat template writes message {i + 1} {times} times")
        # Some releases have no system turn; their rows are counted and noted, not refused.
        if times == 0 and message["content"] and message["role"] != "system":
            raise DataError(f"the chat template leaves out message {i + 1} ({message['role']})")
    if list(order) != sorted(order):
        raise DataError("the chat template changes the order of the messages")


def _place(
    text: str, literals: Sequence[str], contents: Sequence[str], order: Sequence[int]
) -> dict[int, Span]:
    """Return the span of each message, which may lack the white space around its content."""
    spans, at = {}, 0
    for i, content, before, after in zip(order, contents, literals, literals[1:], strict=False):
        start = at + len(before)
        kept = [
            candidate
            for candidate in (content, content.strip(), content.rstrip(), content.lstrip())
            if text.startswith(candidate, start) and text.startswith(after, start + len(candidate))
        ]
        if not kept or not text.startswith(before, at):
            raise DataError(
                f"the chat template changes the text of message {i + 1}: cannot place the loss"
            )
        at = start + len(kept[0])
        spans[i] = (start, at)
    if text[at:] != literals[-1]:
        raise DataError("the chat template changes a message's text: cannot place the loss")
    return spans


def read_template_file(path: Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """Read the chat template in a Jinja file.

    Raises:
        ConfigError: when the file is missing or is not a template.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"data.chat_template: no such file: {path}") from None
    except (OSError, ValueError) as cause:
        raise ConfigError(f"data.chat_template: {path} cannot be read: {cause}") from None
    try:
        return ChatTemplate(source, special_tokens)
    except ModelError as cause:
        raise ConfigError(f"data.chat_template: {path}: {cause}") from None


def template_source(model_dir: Path, config: Mapping[str, Any]) -> str:
    """Return the chat template of a model folder.

    Args:
        model_dir: the folder; its chat_template.jinja takes precedence.
        config: values of its tokenizer_config.json.

    Raises:
        ModelError: when the folder has no chat template.
    """
    path = model_dir / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as cause:
            raise ModelError(f"{path} cannot be read: {cause}") from None
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [e for e in source if isinstance(e, dict) and e.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not isinstance(source, str):
        raise ModelError(
            f"{model_dir} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): use an instruct model, or give one with data.chat_template"
        )
    return source


def special_token_strings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token, eos_token and others as strings; some releases store them as objects."""
    strings = {}
    for name, value in config.items():
        if not name.endswith("_token") or name.startswith("add_"):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            strings[name] = text
    return strings
