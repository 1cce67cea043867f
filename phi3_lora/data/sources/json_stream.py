"""JSON rows: a text in one line, or one JSON text of many rows, which is read in parts."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from phi3_lora.data.rows.conversation import RawRow, RowError, shown
from phi3_lora.errors import DataError

_CHUNK = 1 << 20
_LONGEST_TOKEN = 16
"""Greatest number of characters that a number, literal or escape can lose at a chunk's end."""
_SPACE = " \t\r\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise RowError(f"has the key {shown(twice)} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LENIENT = json.JSONDecoder()


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        RowError: when the text is not JSON, or an object has a key twice.
    """
    try:
        return _DECODER.decode(text)
    except RowError:
        raise
    except json.JSONDecodeError as cause:
        found = f"{cause.msg} at column {cause.colno}"
        if cause.msg.startswith("Unterminated") or cause.pos >= len(text.rstrip()):
            found += "; the line ends within a row: is it whole?"
        raise RowError(f"not JSON: {found}") from None
    except (ValueError, RecursionError) as cause:
        raise RowError(f"not JSON: {cause}") from None


def json_text_rows(
    path: Path, read: Callable[[int], bytes], row_keys: Collection[str]
) -> Iterator[RawRow]:
    """Read the rows of one JSON text: a list of rows, an object around such a list, or one row.

    Args:
        path: the file, for messages.
        read: returns at most the given number of bytes; empty at the end.
        row_keys: keys whose list is part of a row; a list under any other key holds rows.

    Raises:
        DataError: when the text is not JSON: the start of the next row is then unknown.
    """
    text = _Text(path, read)
    if text.peek() == "[":
        yield from _elements(text)
    else:
        yield from _object(text, row_keys)
    if text.peek():
        raise text.fail(
            "not JSON: something follows the end of the text (name a file "
            "with one text per line .jsonl)"
        )


def _elements(text: _Text) -> Iterator[RawRow]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        text.peek()
        line = text.line
        yield RawRow(line, *text.value())
        if text.take(",]") == "]":
            return


def _object(text: _Text, row_keys: Collection[str]) -> Iterator[RawRow]:
    text.take("{")
    line, found, num_lists = text.line, {}, 0
    while text.peek() != "}":
        key, problem = text.value()
        if not isinstance(key, str):
            raise text.fail(f"not JSON: a key must be a string, got {shown(key)}")
        text.take(":")
        if text.peek() == "[" and key not in row_keys:
            num_lists += 1
            if num_lists > 1:
                raise text.fail(f"a second list of rows ({shown(key)}): keep one list in a file")
            yield from _elements(text)
        else:
            found[key], problem = text.value()
        if problem:
            yield RawRow(line, None, problem)
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if not num_lists:
        yield RawRow(line, found)


class _Text:
    """A JSON text with only the current part in memory."""

    def __init__(self, path: Path, read: Callable[[int], bytes]) -> None:
        self._path = path
        self._read = read
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = 1

    def fail(self, problem: str) -> DataError:
        return DataError(f"{self._path}:{self.line}: {problem}")

    def _fill(self) -> None:
        """Read at least as much as is left, so that parsing a long value costs twice its length."""
        rest = self._text[self._at :]
        raw = self._read(max(_CHUNK, len(rest)))
        self._ended = not raw
        try:
            self._text, self._at = rest + self._decode.decode(raw, final=not raw), 0
        except UnicodeDecodeError:
            raise self.fail("not UTF-8 from here on: save the file as UTF-8") from None

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in _SPACE:
                end += 1
            self._advance(end)
            if end < len(self._text):
                return self._text[end]
            if self._ended:
                return ""
            self._fill()

    def take(self, allowed: str) -> str:
        """Read the next character, which must be one of `allowed`."""
        found = self.peek()
        if not found or found not in allowed:
            wanted = " or ".join(allowed)
            raise self.fail(f"not JSON: {wanted} must come here, got {found or 'the end'}")
        self._advance(self._at + 1)
        return found

    def value(self) -> tuple[Any, str | None]:
        """Read the next value; return it, or None and the problem that makes it unusable."""
        self.peek()
        decoder, problem = _DECODER, None
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except RowError as cause:
                # Parse again without the check, to find the end of the value.
                decoder, problem = _LENIENT, str(cause)
                continue
            except json.JSONDecodeError as cause:
                is_cut = cause.msg.startswith("Unterminated") or (
                    cause.pos > len(self._text) - _LONGEST_TOKEN
                )
                if self._ended or not is_cut:
                    self._advance(min(cause.pos, len(self._text)))
                    raise self.fail(f"not JSON: {cause.msg}") from None
                self._fill()
                continue
            except RecursionError:
                raise self.fail("cannot read this JSON: it is nested too deep") from None
            # A number at the end of the current part may continue in the next one.
            if end < len(self._text) or self._ended:
                self._advance(end)
                return (None if problem else value), problem
            self._fill()
