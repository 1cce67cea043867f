"""Rendering of conversations: the text, the spans of turns, and the spans of the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from phi3_lora.data.chat.markers import Markers, Span
from phi3_lora.data.chat.masking import LossSpans, loss_spans, messages_in_loss
from phi3_lora.data.chat.template import ChatTemplate
from phi3_lora.data.options import LossOn
from phi3_lora.data.rows.conversation import Conversation, Message
from phi3_lora.errors import DataError

_CARRIED = ("tools", "tool_calls")
"""Keys of a message that a template must write, besides the content."""
_PROBE = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
)


class Remarks(NamedTuple):
    """Facts about a rendered row for notes to the user."""

    has_marker_text: bool = False
    """True if a message holds the text of a special token; it is encoded as text."""
    num_stripped: int = 0
    """White-space characters at the edges of messages that are not encoded."""
    system_dropped: bool = False
    """True if the template leaves out the row's system message."""


class Rendered(NamedTuple):
    """A conversation as text, with the spans of its parts."""

    text: str
    contents: list[Span]
    """Span of each message's content, in order."""
    loss: LossSpans
    borders: list[int] = []  # noqa: RUF012 - never changed in place
    """Character positions at which a token must begin."""
    remarks: Remarks = Remarks()
    is_plain: bool = False
    """True for plain text, which no template wrote."""


class Renderer:
    """Renderer of conversations by a chat template and the markers of its tokenizer."""

    def __init__(self, template: ChatTemplate, markers: Markers) -> None:
        """Find the token that ends an answer.

        Raises:
            DataError: when the contents of a short conversation cannot be found in its text.
        """
        self.template = template
        self.markers = markers
        text, contents = template.content_spans(_PROBE)
        closing = markers.at(text, contents[-1][1])
        self.end_of_turn = None if closing is None else text[slice(*closing)]

    def notes(self) -> list[str]:
        """Return notes for the user on the template."""
        found = []
        if self.end_of_turn is None:
            found.append(
                "the chat template puts no special token of this tokenizer after an answer, so "
                "the model does not learn where to stop; the tokenizer's special tokens: "
                f"{', '.join(self.markers.texts[:12])}"
            )
        text, contents = self.template.content_spans(_PROBE)
        prompt = self.template.render(_PROBE[:-1], add_generation_prompt=True)
        if text[: contents[-1][0]] != prompt:
            found.append(
                "the chat template begins an answer differently with add_generation_prompt, so "
                "generate sees another text than training"
            )
        return found

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """Render a conversation up to the start of the assistant's next answer.

        Raises:
            DataError: when the template cannot write the conversation.
        """
        messages = [m for m in messages if not _is_empty_system(m)]
        _check_text(messages)
        text, contents = self.template.content_spans(messages, add_generation_prompt=True)
        self._check_carried(messages, text, add_generation_prompt=True)
        turns = self._turns(messages, text, contents)
        borders = self._borders(messages, text, contents, turns)
        remarks = Remarks(has_marker_text=self.markers.touch(text, contents))
        return Rendered(text, contents, LossSpans(False, []), borders, remarks)

    def conversation(self, row: Conversation, loss_on: LossOn = "assistant") -> Rendered:
        """Render a row.

        Args:
            row: a conversation, or plain text, which is in the loss as a whole.
            loss_on: assistant, last or all.

        Raises:
            DataError: when a text is damaged, an answer is empty, or the template cannot write
                the row.
        """
        _check_text(row.messages)
        if row.whole:
            return self._plain_text(row.messages[0]["content"])
        in_loss = messages_in_loss(row, loss_on)
        kept = [i for i, m in enumerate(row.messages) if not _is_empty_system(m)]
        messages = [row.messages[i] for i in kept]
        for i in kept:
            message = row.messages[i]
            if message["role"] == "assistant" and not (
                message["content"].strip() or message.get("tool_calls")
            ):
                raise DataError(f"message {i + 1}: the assistant's answer is empty")
        text, contents = self.template.content_spans(messages)
        self._check_carried(messages, text)
        turns = self._turns(messages, text, contents)
        return Rendered(
            text,
            contents,
            loss_spans([in_loss[i] for i in kept], turns, everywhere=loss_on == "all"),
            self._borders(messages, text, contents, turns),
            self._remarks(messages, text, contents),
        )

    def _plain_text(self, text: str) -> Rendered:
        remarks = Remarks(has_marker_text=self.markers.any_in(text))
        return Rendered(text, [(0, len(text))], LossSpans(True, []), remarks=remarks, is_plain=True)

    def _remarks(self, messages: Sequence[Message], text: str, contents: Sequence[Span]) -> Remarks:
        system_dropped = messages[0]["role"] == "system" and contents[0][0] == contents[0][1]
        spoken = sum(len(m["content"]) for m in messages[system_dropped:])
        trimmed = spoken - sum(end - start for start, end in contents)
        return Remarks(
            has_marker_text=self.markers.touch(text, contents),
            num_stripped=trimmed + self.markers.stripped_whitespace(text, contents),
            system_dropped=system_dropped and bool(messages[0]["content"]),
        )

    def _turns(
        self, messages: Sequence[Message], text: str, contents: Sequence[Span]
    ) -> list[Span | None]:
        """Return the span of each content with its end token; None if the content is empty."""
        turns: list[Span | None] = []
        for i, (message, (start, end)) in enumerate(zip(messages, contents, strict=True)):
            if message.get("tool_calls"):
                turns.append(self._call_turn(messages, i, text, end))
                continue
            closing = self.markers.at(text, end) if start < end else None
            turns.append((start, closing[1] if closing else end) if start < end else None)
        return turns

    def _call_turn(self, messages: Sequence[Message], i: int, text: str, at: int) -> Span:
        """Return the span of an answer with tool calls: from the prompt's end to the end token."""
        opening = self.template.render(messages[:i], add_generation_prompt=True)
        closing = None
        if text.startswith(opening) and self.end_of_turn is not None:
            # Calls hold no marker's text, so the first end token is the turn's own.
            closing = text.find(self.end_of_turn, max(at, len(opening)))
        if closing is None or closing < 0:
            raise DataError(
                f"message {i + 1}: cannot find where the chat template's text of the tool_calls "
                "begins and ends"
            )
        return len(opening), closing + len(self.end_of_turn or "")

    def _borders(
        self,
        messages: Sequence[Message],
        text: str,
        contents: Sequence[Span],
        turns: Sequence[Span | None],
    ) -> list[int]:
        """Return the starts of answers whose first token could also cover the template's text.

        A prompt ends at such a start, so no token may cross it.
        """
        found, floor = [], 0
        for message, turn, (_, end) in zip(messages, turns, contents, strict=True):
            is_answer = message["role"] == "assistant" and turn is not None
            if is_answer and turn and not self.markers.closes(text[floor : turn[0]]):
                found.append(turn[0])
            floor = end
        return found

    def _check_carried(
        self, messages: Sequence[Message], text: str, *, add_generation_prompt: bool = False
    ) -> None:
        """Check that the text has all tools and tool calls, and that they hold no marker's text."""
        for i, message in enumerate(messages):
            if len(message) == 2:
                continue
            held = {k: v for k, v in message.items() if k not in ("role", "content")}
            if self.markers.any_in(json.dumps(held, ensure_ascii=False)):
                raise DataError(
                    f"message {i + 1}: {', '.join(held)} hold the text of a special token, which "
                    "the chat template would write as a token: remove it"
                )
            for name in _CARRIED:
                if message.get(name) and text == self._without(
                    messages, i, name, add_generation_prompt
                ):
                    raise DataError(f"the chat template leaves out the {name} of message {i + 1}")

    def _without(
        self, messages: Sequence[Message], i: int, name: str, add_generation_prompt: bool
    ) -> str | None:
        """Render without one key of one message; return None if the template refuses."""
        bare: list[Message] = [dict(m) for m in messages]
        del bare[i][name]
        try:
            return self.template.render(bare, add_generation_prompt=add_generation_prompt)
        except DataError:
            return None


def _is_empty_system(message: Message) -> bool:
    """Return whether a message is a system message without text and tools; it is left out."""
    return (
        message["role"] == "system" and not message["content"].strip() and not message.get("tools")
    )


def _check_text(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages, start=1):
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"message {i} ({message['role']}): holds half a surrogate pair"
            ) from None
