"""Fast rendering of rows: the template runs once for all rows of one shape.

Rows with equal roles have the same text around their contents, if the template provably only
places contents (template_proof.py). The loss of such rows is between known markers: the mask then
needs the ids alone, not the offsets of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from phi3_lora.data.chat.markers import Span
from phi3_lora.data.chat.masking import Between, LossSpans
from phi3_lora.data.chat.rendering import Rendered, Renderer
from phi3_lora.data.options import LossOn
from phi3_lora.data.rows.conversation import Conversation

_SHAPES_KEPT = 10_000
_Key = tuple[object, ...]


class CachedRendering(NamedTuple):
    """The text of a row and its loss, both derived from the row's shape."""

    text: str
    loss: Between
    num_stripped: int
    """White-space characters at the edges of messages that are not encoded."""


class _Shape(NamedTuple):
    literals: list[str]
    """The text before, between and after the contents."""
    loss: Between


class Shapes:
    """Cache of the template's text and the loss, by roles, weights and loss_on."""

    def __init__(self, renderer: Renderer) -> None:
        """Start without shapes; learn adds them."""
        self._renderer = renderer
        self._markers = renderer.markers
        self._known: dict[_Key, _Shape | None] = {}
        self._begin_markers = sorted({text[0] for text in self._markers.texts})
        """First characters of markers; in a content without them no marker begins."""

    def cached(self, row: Conversation, loss_on: LossOn) -> CachedRendering | None:
        """Return the text that the template writes for a row; None if its shape is not known."""
        shape = self._known.get(_key(row, loss_on))
        if shape is None:
            return None
        contents = [message["content"] for message in row.messages]
        text = _joined(shape.literals, contents)
        is_bare = all(c and not c[0].isspace() and not c[-1].isspace() for c in contents)
        may_hold_marker = any(c in content for content in contents for c in self._begin_markers)
        # The renderer decides on empty turns, half surrogates and the text of markers.
        if not (is_bare or all(map(str.strip, contents))) or not _is_unicode(text):
            return None
        if is_bare and not may_hold_marker:
            return CachedRendering(text, shape.loss, 0)
        spans = _spans(shape.literals, contents)
        if may_hold_marker and self._markers.touch(text, spans):
            return None
        return CachedRendering(
            text, shape.loss, 0 if is_bare else self._markers.stripped_whitespace(text, spans)
        )

    def learn(self, row: Conversation, loss_on: LossOn, rendered: Rendered) -> None:
        """Store the shape of a row that was rendered in full, if other rows can use it."""
        key = _key(row, loss_on)
        contents = [message["content"] for message in row.messages]
        is_usual = not rendered.remarks.has_marker_text and all(map(str.strip, contents))
        if len(self._known) < _SHAPES_KEPT and key not in self._known and key and is_usual:
            self._known[key] = self._shape(row, contents, rendered)

    def _shape(
        self, row: Conversation, contents: Sequence[str], rendered: Rendered
    ) -> _Shape | None:
        literals = self._renderer.template.literals([message["role"] for message in row.messages])
        if literals is None or rendered.borders or rendered.remarks.system_dropped:
            return None
        # A content could complete a marker whose first characters the template writes.
        if rendered.text != _joined(literals, contents) or any(
            map(self._markers.may_begin_at_end, literals)
        ):
            return None
        loss = self._between(rendered.text, _spans(literals, contents), rendered.loss)
        return None if loss is None else _Shape(literals, loss)

    def _between(self, text: str, contents: Sequence[Span], loss: LossSpans) -> Between | None:
        """Return the loss as ranges between markers; None if a span does not end at markers."""
        written = list(self._markers.written(text, contents))
        ends = [end for _, end, _ in written]
        opening: list[int] = []
        closing: list[int] = []
        for start, end in loss.spans:
            last = int(np.searchsorted(ends, start, side="right")) - 1
            if last < 0 or end not in ends:
                return None
            if not self._markers.closes(text[written[last][0] : start]):
                return None
            opening.append(last)
            closing.append(ends.index(end))
        ids = [marker.id for _, _, marker in written]
        arrays = [np.array(values, dtype=np.int32) for values in (ids, opening, closing)]
        return Between(loss.everywhere, *arrays)


def _key(row: Conversation, loss_on: LossOn) -> _Key:
    """Return the key that rows of one shape share; empty for a row without a shape."""
    messages = row.messages
    if row.whole or len(messages) * 2 != sum(map(len, messages)):
        return ()
    return (loss_on, row.weights, *[message["role"] for message in messages])


def _joined(literals: Sequence[str], contents: Sequence[str]) -> str:
    parts = [""] * (len(literals) + len(contents))
    parts[::2], parts[1::2] = literals, contents
    return "".join(parts)


def _spans(literals: Sequence[str], contents: Sequence[str]) -> list[Span]:
    """Return the span of each content in the joined text."""
    lengths = itertools.chain.from_iterable(
        (len(literal), len(content)) for literal, content in zip(literals, contents, strict=False)
    )
    edges = list(itertools.accumulate(lengths))
    return list(zip(edges[::2], edges[1::2], strict=True))


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
