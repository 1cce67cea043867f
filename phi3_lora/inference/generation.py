"""Generation of text: prompts go in, pieces of the answers come out as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.rows.conversation import Message
from phi3_lora.engine.protocol import Engine
from phi3_lora.engine.request import Sampling

FinishReason = Literal["stop", "length"]
"""stop: a stop token came. length: max_new_tokens were generated, or the context is full."""
Prompt = str | Sequence[Message]
"""A user's message, or a conversation."""
_UNFINISHED = "\ufffd"
"""Decoded from bytes that are not a whole character."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of one answer."""

    index: int
    """Index of the prompt in the batch."""
    text_delta: str
    """Text to append to the answer; empty while a character is incomplete."""
    token_id: int | None
    """The new token; None in the piece that closes an answer because the context is full."""
    finish_reason: FinishReason | None
    """None until the answer ends."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: list[int]
    """All generated tokens, including the stop token if there is one."""
    finish_reason: FinishReason

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class TextStream:
    """Decodes the tokens of one answer as they come.

    A token is decoded together with the few tokens before it, because a decoder drops the space at
    the start of a text. The work for a token does not grow with the answer.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """Tokens to decode together: those of the last text returned, then the pending ones."""
        self._num_returned = 0
        """Number of tokens at the start of _ids whose text was returned."""

    def add(self, token: int) -> str:
        """Return the text that a token completes; empty while a character is incomplete."""
        self._ids.append(token)
        known, text = self._decoded()
        if text.endswith(_UNFINISHED):
            return ""
        if self._tokenizer.decode(self._ids[self._num_returned :]):
            del self._ids[: self._num_returned]
        self._num_returned = len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """Return the text of the tokens that never became a whole character."""
        known, text = self._decoded()
        self._num_returned = len(self._ids)
        return text[len(known) :]

    def _decoded(self) -> tuple[str, str]:
        """Return the text already returned, and that text with the pending tokens."""
        decode = self._tokenizer.decode
        return decode(self._ids[: self._num_returned]), decode(self._ids)


def encode_prompts(tokenizer: ChatTokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Encode prompts up to the start of the assistant's answer.

    Raises:
        DataError: when the chat template cannot render a conversation.
    """
    conversations = [[user_message(p)] if isinstance(p, str) else p for p in prompts]
    return [tokenizer.encode_prompt(messages) for messages in conversations]


def user_message(text: str) -> Message:
    """Build a user's message."""
    return {"role": "user", "content": text}


def stream(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Iterator[Piece]:
    """Generate an answer to each prompt and yield the pieces as they come.

    The last piece of each answer, and no other, has a finish_reason.

    Args:
        engine: the model.
        tokenizer: the model's tokenizer.
        prompts: token ids.
        sampling: how tokens are chosen, and which tokens end an answer.

    Raises:
        DataError: when a prompt is empty or longer than the model's context.
    """
    texts = {index: TextStream(tokenizer) for index in range(len(prompts))}
    num_new = [0] * len(prompts)
    for index, token in engine.generate(prompts, sampling):
        num_new[index] += 1
        if token in sampling.stop_ids:
            yield Piece(index, texts.pop(index).finish(), token, "stop")
        elif num_new[index] == sampling.max_new_tokens:
            text = texts.pop(index)
            yield Piece(index, text.add(token) + text.finish(), token, "length")
        else:
            yield Piece(index, texts[index].add(token), token, None)
    for index, text in texts.items():
        yield Piece(index, text.finish(), None, "length")


def generate(
    engine: Engine,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_piece: Callable[[Piece], None] = lambda piece: None,
) -> list[Generation]:
    """Generate an answer to each prompt and return them in the order of the prompts.

    Args:
        engine: the model.
        tokenizer: the model's tokenizer.
        prompts: token ids.
        sampling: how tokens are chosen, and which tokens end an answer.
        on_piece: receives each piece as it comes.

    Raises:
        DataError: when a prompt is empty or longer than the model's context.
    """
    token_ids: list[list[int]] = [[] for _ in prompts]
    reasons: dict[int, FinishReason] = {}
    for piece in stream(engine, tokenizer, prompts, sampling):
        if piece.token_id is not None:
            token_ids[piece.index].append(piece.token_id)
        if piece.finish_reason is not None:
            reasons[piece.index] = piece.finish_reason
        on_piece(piece)
    return [
        Generation(_text(tokenizer, ids, sampling), ids, reasons[index])
        for index, ids in enumerate(token_ids)
    ]


def _text(tokenizer: ChatTokenizer, ids: Sequence[int], sampling: Sampling) -> str:
    return tokenizer.decode([token for token in ids if token not in sampling.stop_ids])
