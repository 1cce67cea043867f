"""Search for special tokens in rendered text, and for the white space that they strip.

A marker counts only if the template wrote it: in a message's content it is text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

Span = tuple[int, int]
"""Characters [start, end) of a text."""
_NOT_SPACES = "\x1c\x1d\x1e\x1f"
"""White space for Python, but not for Unicode and the tokenizers library."""
_SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in _NOT_SPACES)


class _Flags(Protocol):
    """The fields of tokenizers.AddedToken that Markers reads."""

    @property
    def lstrip(self) -> bool: ...

    @property
    def rstrip(self) -> bool: ...


class Marker(NamedTuple):
    """One special token, and the white space that it strips."""

    text: str
    id: int
    strips_before: bool
    strips_after: bool


class Segment(NamedTuple):
    """Characters [start, end) of a text: a marker that the template wrote, or text to encode."""

    start: int
    end: int
    marker: Marker | None


class Markers:
    """The special tokens of a tokenizer, with methods to find them in a text."""

    def __init__(self, tokens: Mapping[int, tuple[str, _Flags]]) -> None:
        """Index the tokens.

        Args:
            tokens: id -> the token's text and its flags.
        """
        self._known = {
            text: Marker(text, i, flags.lstrip, flags.rstrip)
            for i, (text, flags) in tokens.items()
            if text
        }
        self.ids = sorted(marker.id for marker in self._known.values())
        self.texts = sorted(self._known)
        # If several markers begin at one character, the longest wins, as in tokenizers.
        longest_first = sorted(self._known, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._closes: dict[str, bool] = {}

    def at(self, text: str, at: int) -> Span | None:
        """Find the marker that begins at a position or after white space there."""
        match = self._pattern.match(text, _after_spaces(text, at))
        return None if match is None else match.span()

    def any_in(self, text: str) -> bool:
        """Return whether a text holds the text of a marker."""
        return self._pattern.search(text) is not None

    def touch(self, text: str, contents: Sequence[Span]) -> bool:
        """Return whether the text of a marker overlaps one of the contents."""
        filled = [span for span in contents if span[0] < span[1]]
        at = 0
        for match in self._pattern.finditer(text):
            while at < len(filled) and filled[at][1] <= match.start():
                at += 1
            if at < len(filled) and filled[at][0] < match.end():
                return True
        return False

    def closes(self, literal: str) -> bool:
        """Return whether no token can reach over the end of the template's text.

        This is true after a marker, and after white space that a marker strips.
        """
        known = self._closes.get(literal)
        if known is None:
            last = self._last(literal)
            known = last is not None and (last[1].strips_after or last[0] == len(literal))
            if len(self._closes) < 1000:
                self._closes[literal] = known
        return known

    def may_begin_at_end(self, literal: str) -> bool:
        """Return whether a text ends with the first characters of a marker."""
        return any(
            literal.endswith(text[:size]) for text in self.texts for size in range(1, len(text))
        )

    def stripped_whitespace(self, text: str, contents: Sequence[Span]) -> int:
        """Count the white space at the edges of contents that neighbouring markers strip."""
        total, floor = 0, 0
        for start, end in contents:
            if start < end:
                total += self._stripped_at_edges(text, floor, start, end)
            floor = end
        return total

    def _stripped_at_edges(self, text: str, floor: int, start: int, end: int) -> int:
        content = text[start:end]
        leading = len(content) - len(content.lstrip(_SPACES))
        trailing = len(content) - len(content.rstrip(_SPACES))
        count = 0
        if leading:
            last = self._last(text[floor:start])
            count = leading if last is not None and last[1].strips_after else 0
        if trailing and count < len(content):
            following = self._pattern.match(text, _after_spaces(text, end))
            if following is not None and self._known[following.group()].strips_before:
                count += trailing
        return min(count, len(content))

    def _last(self, literal: str) -> tuple[int, Marker] | None:
        """Return the marker at the end of a text, apart from white space, and its end position."""
        stripped = literal.rstrip(_SPACES)
        last = None
        for match in self._pattern.finditer(stripped):
            last = match
        if last is None or last.end() < len(stripped):
            return None
        return last.end(), self._known[last.group()]

    def segments(
        self, text: str, contents: Sequence[Span], borders: Sequence[int] = ()
    ) -> list[Segment]:
        """Split a text into segments to encode one by one, without stripped white space.

        Args:
            text: the rendered text.
            contents: spans of the contents, in order; no marker counts there.
            borders: positions at which a segment must begin.
        """
        found: list[Segment] = []
        begin = 0
        for start, end, marker in self.written(text, contents):
            kept = len(text[begin:start].rstrip(_SPACES)) if marker.strips_before else start - begin
            found.append(Segment(begin, begin + kept, None))
            found.append(Segment(start, end, marker))
            begin = _after_spaces(text, end) if marker.strips_after else end
        found.append(Segment(begin, len(text), None))
        cut = [part for segment in found for part in _cut(segment, borders)]
        return [segment for segment in cut if segment.start < segment.end]

    def written(self, text: str, contents: Sequence[Span]) -> Iterator[tuple[int, int, Marker]]:
        """Find the markers between the contents: start, end and marker of each."""
        edges = [0, *(at for span in contents for at in span), len(text)]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            for match in self._pattern.finditer(text, start, end):
                yield match.start(), match.end(), self._known[match.group()]


def _cut(segment: Segment, borders: Sequence[int]) -> list[Segment]:
    if segment.marker is not None:
        return [segment]
    inner = [b for b in borders if segment.start < b < segment.end]
    edges = [segment.start, *inner, segment.end]
    return [Segment(a, b, None) for a, b in itertools.pairwise(edges)]


def _after_spaces(text: str, at: int) -> int:
    """Return the position of the first character from `at` on that is not white space."""
    while at < len(text) and text[at] in _SPACES:
        at += 1
    return at
