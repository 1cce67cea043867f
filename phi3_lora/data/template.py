"""A tokenizer's own chat template, rendered in jinja2's sandbox, and where each turn lies in it.

Source: transformers, utils/chat_template_utils.py (environment, tojson, generation tag).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_lora.data.records import Message
from phi3_lora.errors import DataError, ModelError

_REFUSALS = (TypeError, ValueError, ArithmeticError, RecursionError, LookupError)
"""What a template's own code can raise."""
_SENTINEL = "\ue000{}\ue001"


class _GenerationTag(Extension):
    """Accepts {% generation %} blocks, which mark answers for other trainers, as plain text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads this class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's own content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """Renders conversations and tells which characters are whose."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: jinja2 text.
            special_tokens: names the template may use, for example bos_token.

        Raises:
            ModelError: when the template is no valid jinja2.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as cause:
            raise ModelError(f"the chat template is not valid jinja2: {cause}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as the model reads it.

        Raises:
            DataError: when the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, *_REFUSALS) as cause:
            raise DataError(f"the chat template refuses the conversation: {cause}") from None

    def content_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the characters [start, end) of each message's content in it.

        The conversation is rendered a second time with a mark in place of each content; the text
        between the marks is the template's own. No marker string is searched for.

        Raises:
            DataError: when the template changes a content in a way that cannot be followed.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        if any("\ue000" in m["content"] for m in messages):
            raise DataError("a message holds the private-use character U+E000: remove it")
        # An empty content stays empty: templates test for it.
        marked = [
            {**m, "content": _SENTINEL.format(i) if m["content"] else ""}
            for i, m in enumerate(messages)
        ]
        rest = self.render(marked, add_generation_prompt=add_generation_prompt)
        spans, at = [], 0
        for i, message in enumerate(messages):
            literal, mark, after = rest.partition(_SENTINEL.format(i))
            if not mark:
                if message["role"] == "assistant":
                    raise DataError(f"the chat template leaves out message {i + 1} (assistant)")
                spans.append((at, at))
                continue
            content = _kept_content(text, at, literal, message["content"], i)
            start = at + len(literal)
            at = start + len(content)
            spans.append((start, at))
            rest = after
        if text[at:] != rest:
            raise DataError("the chat template changes a message's text: cannot place the loss")
        return text, spans


def _kept_content(text: str, at: int, literal: str, content: str, index: int) -> str:
    """The content as the template wrote it: whole, or without surrounding white space."""
    for candidate in (content, content.strip()):
        if text.startswith(literal + candidate, at):
            return candidate
    raise DataError(
        f"the chat template changes the text of message {index + 1}: cannot place the loss"
    )
