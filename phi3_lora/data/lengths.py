"""Rows that are longer than the model or the settings allow: shortened by whole turns, or not.

A turn is a user's message with all that follows it up to the next one. No message is ever cut.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from phi3_lora.data.masking import messages_in_loss
from phi3_lora.data.records import Conversation
from phi3_lora.data.tokenizer import ChatTokenizer, Document
from phi3_lora.errors import DataError, listing

Encode = Callable[[Sequence[Conversation]], list[Document]]
LEFT, RIGHT = "truncate_left", "truncate_right"


class Fit(NamedTuple):
    """Rows after the limit was applied."""

    documents: list[Document]
    """What fits, in the order of the rows."""
    shortened: list[Document]
    """Those among them that lost turns."""
    dropped: list[Document]
    """What does not fit, as long as it was."""


def fit_to(
    pairs: Sequence[tuple[Conversation, Document]],
    tokenizer: ChatTokenizer,
    *,
    limit: int,
    too_long: str,
    loss_on: str,
) -> Fit:
    """Drop or shorten what is too long.

    Args:
        pairs: each row with its document.
        tokenizer: that made the documents.
        limit: tokens that a document may have.
        too_long: drop, truncate_left or truncate_right.
        loss_on: assistant, last or all.
    """
    longer = [i for i, (_, document) in enumerate(pairs) if len(document.tokens) > limit]
    shorter: dict[int, Document] = {}
    if too_long in (LEFT, RIGHT):
        encode = functools.partial(tokenizer.encode_conversations, loss_on=loss_on)
        rows = [pairs[i][0] for i in longer]
        found = shorten(rows, encode, limit=limit, side=too_long, loss_on=loss_on)
        shorter = {i: d for i, d in zip(longer, found, strict=True) if d is not None}
    gone = set(longer) - set(shorter)
    return Fit(
        [shorter.get(i, d) for i, (_, d) in enumerate(pairs) if i not in gone],
        list(shorter.values()),
        [pairs[i][1] for i in sorted(gone)],
    )


def refuse_longer(documents: Sequence[Document], limit: int, title: str) -> None:
    """Check that no document is too long.

    Raises:
        DataError: with the count and the first of those that are.
    """
    longer = [d for d in documents if len(d.tokens) > limit]
    if longer:
        problems = [f"{d.source}: {len(d.tokens):,} tokens" for d in longer]
        raise DataError(
            listing(
                f"{title}: {len(longer):,} of {len(documents):,} rows. Shorten them, raise the "
                "limit (--max-length), or set data.too_long to drop, truncate_left or "
                "truncate_right:",
                problems,
            )
        )


def shorten(
    rows: Sequence[Conversation], encode: Encode, *, limit: int, side: str, loss_on: str
) -> list[Document | None]:
    """Each row without as few whole turns as needed to fit; None where even one does not.

    Args:
        rows: rows that are too long.
        encode: conversations to documents.
        limit: tokens that a document may have.
        side: truncate_left drops the oldest turns, but never the system message;
            truncate_right drops the last turns.
        loss_on: assistant, last or all; of the row as it was, so that no other answer becomes
            the last one.
    """
    rows = [dataclasses.replace(r, weights=messages_in_loss(r, loss_on)) for r in rows]
    fitting: list[Document | None] = [None] * len(rows)
    fewest, most = [1] * len(rows), [num_turns(row) for row in rows]
    # Bisection, all rows at once: one pass over the texts for each halving.
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
    """Turns that can be dropped as a whole; plain text is one."""
    return 1 if row.whole else max(1, len(_starts(row)))


def without_turns(row: Conversation, count: int, side: str) -> Conversation:
    """A row without its oldest or last turns, its weights with it.

    Args:
        row: a conversation.
        count: turns to drop; fewer than it has.
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
