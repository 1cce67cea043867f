"""Shortening of rows that are longer than the token limit, by whole turns.

A turn is a user message and all messages up to the next user message. No message is ever cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from phi3_lora.data.chat.masking import messages_in_loss
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.options import LossOn, TooLong
from phi3_lora.data.rows.conversation import Conversation

Encode = Callable[[Sequence[Conversation]], list[Document]]
LEFT: Final = "truncate_left"
RIGHT: Final = "truncate_right"


def shorten(
    rows: Sequence[Conversation], encode: Encode, *, limit: int, side: TooLong, loss_on: LossOn
) -> list[Document | None]:
    """Drop as few whole turns of each row as needed to fit.

    Args:
        rows: rows that are too long.
        encode: function from conversations to documents.
        limit: tokens that a document may have.
        side: truncate_left drops the oldest turns, but never the system message;
            truncate_right drops the last turns.
        loss_on: assistant, last or all; `last` means the last answer of the full row.

    Returns:
        One document per row; None if a single turn is too long.
    """
    rows = [dataclasses.replace(r, weights=messages_in_loss(r, loss_on)) for r in rows]
    fitting: list[Document | None] = [None] * len(rows)
    fewest, most = [1] * len(rows), [num_turns(row) for row in rows]
    # Bisection for all rows at once: each halving is one pass over the texts.
    while pending := [i for i in range(len(rows)) if fewest[i] < most[i]]:
        tried = {i: (fewest[i] + most[i]) // 2 for i in pending}
        cut = [without_turns(rows[i], tried[i], side) for i in pending]
        for i, document in zip(pending, encode(cut), strict=True):
            if len(document.tokens) <= limit:
                fitting[i], most[i] = document, tried[i]
            else:
                fewest[i] = tried[i] + 1
    return fitting


def num_turns(row: Conversation) -> int:
    """Count the turns of a row; plain text is one turn."""
    return 1 if row.whole else max(1, len(_starts(row)))


def without_turns(row: Conversation, count: int, side: TooLong) -> Conversation:
    """Drop the oldest or last turns of a row, with their weights.

    Args:
        row: a conversation.
        count: number of turns to drop; smaller than num_turns.
        side: truncate_left or truncate_right.
    """
    starts = _starts(row)
    kept = list(range(len(row.messages)))
    if side == LEFT:
        kept = kept[: starts[0]] + kept[starts[count] :]
    else:
        kept = kept[: starts[len(starts) - count]]
    return dataclasses.replace(
        row,
        messages=tuple(row.messages[i] for i in kept),
        weights=None if row.weights is None else tuple(row.weights[i] for i in kept),
    )


def _starts(row: Conversation) -> list[int]:
    return [i for i, message in enumerate(row.messages) if message["role"] == "user"]
