"""Loss masks: the choice of the tokens of a conversation that are in the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Bool, Int32
from phi3_lora.data.chat.markers import Span
from phi3_lora.data.options import LossOn
from phi3_lora.data.rows.conversation import Conversation


class LossSpans(NamedTuple):
    """The loss of a rendered conversation, as spans of characters."""

    everywhere: bool
    """True if every token outside the spans counts; False if only tokens in the spans count."""
    spans: list[Span]


class Between(NamedTuple):
    """The loss of a rendered conversation, as ranges between markers of its template."""

    everywhere: bool
    """True if every token outside the ranges counts; False if only tokens in the ranges count."""
    marker_ids: Int32
    """(M,) ids of all markers, in order."""
    opening: Int32
    """(R,) index of the marker before each range."""
    closing: Int32
    """(R,) index of the last marker of each range."""


def messages_in_loss(row: Conversation, loss_on: LossOn = "assistant") -> tuple[bool, ...]:
    """Return for each message of a row whether it is in the loss; the row's weights win.

    Args:
        row: a conversation.
        loss_on: assistant (every answer), last (the last answer) or all (every message).
    """
    is_answer = [message["role"] == "assistant" for message in row.messages]
    default = _DEFAULTS[loss_on](is_answer)
    own = row.weights or (None,) * len(is_answer)
    return tuple(d if w is None else w for d, w in zip(default, own, strict=True))


def _last_only(is_answer: list[bool]) -> list[bool]:
    last = len(is_answer) - 1 - is_answer[::-1].index(True) if True in is_answer else -1
    return [i == last for i in range(len(is_answer))]


_DEFAULTS: Mapping[str, Callable[[list[bool]], list[bool]]] = {
    "assistant": list,
    "last": _last_only,
    "all": lambda is_answer: [True] * len(is_answer),
}


def loss_spans(
    in_loss: Sequence[bool], turns: Sequence[Span | None], *, everywhere: bool
) -> LossSpans:
    """Choose the spans of the loss.

    Args:
        in_loss: True for each message that is in the loss.
        turns: span of each message's content with its end token; None if the template leaves the
            message out.
        everywhere: True if text outside of messages, such as a header, counts too.
    """
    chosen = [
        turn
        for counts, turn in zip(in_loss, turns, strict=True)
        if turn is not None and counts != everywhere
    ]
    return LossSpans(everywhere, chosen)


def supervised_tokens(
    tokens: Int32, offsets: Sequence[Span], loss: LossSpans, marker_ids: Int32
) -> Bool:
    """Return the loss mask: (N,) bool, True for ids to be learnt.

    A token belongs to a span if it shares a character with the span. If everything counts, the
    first id still does not, since no id comes before it.

    Args:
        tokens: (N,) ids.
        offsets: (N,) span of each id in the rendered text.
        loss: the spans of the loss.
        marker_ids: ids of the special tokens.
    """
    supervised = np.full(len(tokens), loss.everywhere, dtype=bool)
    supervised[:1] = False
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    # A marker's span covers the white space that it strips, even white space of an answer.
    marker = np.isin(tokens, marker_ids)
    for start, end in loss.spans:
        touches = (places[:, 1] > start) & (places[:, 0] < end)
        supervised[touches & (~marker | (places[:, 0] >= start))] = not loss.everywhere
    return supervised


def supervised_between(
    tokens: Int32, ends: NDArray[np.int64], losses: Sequence[Between], is_marker: Bool
) -> tuple[Bool, list[int]]:
    """Return the loss masks of many documents at once, without offsets of tokens.

    Args:
        tokens: (T,) ids of all documents, end to end.
        ends: (D,) index after each document's last id.
        losses: (D,) loss of each document.
        is_marker: (vocabulary,) True for ids of special tokens.

    Returns:
        (T,) loss masks; and the indices of documents whose markers differ from the template's.
        Masks of these documents are not valid.
    """
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends])[:-1]
    places = np.flatnonzero(is_marker[tokens])
    first = np.searchsorted(places, starts)
    counts = np.searchsorted(places, ends) - first
    written = _joined([loss.marker_ids for loss in losses])
    is_counted = np.array_equal(counts, [len(loss.marker_ids) for loss in losses])
    strange: list[int] = []
    if not (is_counted and np.array_equal(tokens[places], written)):
        strange = [
            i
            for i, (loss, at, count) in enumerate(zip(losses, first, counts, strict=True))
            if not np.array_equal(tokens[places[at : at + count]], loss.marker_ids)
        ]
    left_out = set(strange)
    known = [loss for i, loss in enumerate(losses) if i not in left_out]
    num_ranges = np.array([len(loss.opening) for loss in known], dtype=np.int64)
    before = np.repeat(np.delete(first, strange), num_ranges)
    changes = np.zeros(len(tokens) + 1, dtype=np.int8)
    changes[places[before + _joined([loss.opening for loss in known])] + 1] += 1
    changes[places[before + _joined([loss.closing for loss in known])] + 1] -= 1
    everywhere = np.repeat(
        np.array([loss.everywhere for loss in losses], dtype=bool), ends - starts
    )
    supervised = (np.cumsum(changes[:-1], dtype=np.int8) > 0) != everywhere
    supervised[starts] = False
    return supervised, strange


def _joined(parts: Sequence[Int32]) -> Int32:
    return np.concatenate([np.zeros(0, dtype=np.int32), *parts])
