"""Documents token by token, coloured by whether the loss counts, on a terminal and as a page."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.options import Outcome
from phi3_lora.data.quality.checks import Previewed
from phi3_lora.report.pages import render_page
from phi3_lora.storage.atomic import replace_file

MOST_TOKENS = 4096
"""Tokens of a document that are shown; of a longer one the first and the last of them."""

_MOST_JOINED = 4
"""Tokens that one character of UTF-8 can take."""
_DOTTED_CIRCLE = "\u25cc"
_SPACE, _LINE_END, _TAB = "\u00b7", "\u21b5", "\u2192"
_OPENING, _CLOSING = "\u27e6", "\u27e7"
_SIGNS = _SPACE + _LINE_END + _TAB + _OPENING + _CLOSING
"""Signs that stand for other characters; in the data they are shown by their numbers."""
_SHAPELESS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<unk>")
"""Text that reads like a special token of the family."""
_STYLES = {
    (True, False): ("black on green", "black on bright_green"),
    (True, True): ("bold magenta on green", "bold magenta on bright_green"),
    (False, False): ("default", "default on grey23"),
    (False, True): ("bold magenta", "bold magenta on grey23"),
}
"""(in the loss, special) -> the styles that neighbouring tokens take in turn."""


class Piece(NamedTuple):
    """One token, or the few that make up one character."""

    ids: tuple[int, ...]
    text: str
    """The unchanged text; a special token is its name."""
    is_learnt: bool
    is_special: bool


class Gap(NamedTuple):
    """Tokens in the midst of a long document that are not shown."""

    num_tokens: int
    num_learnt: int

    def __str__(self) -> str:
        """Return the text that stands in place of the tokens."""
        return f"[{self.num_tokens:,} tokens not shown, {self.num_learnt:,} of them in the loss]"


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row of a preview."""

    source: str
    """File and line."""
    token_ids: list[int]
    loss_mask: list[bool]
    training: Outcome
    """How training treats the row; error stops it."""
    remark: str
    """Why the row is not kept as it is; otherwise empty."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values of --json."""
        return asdict(self)


def preview_rows(rows: Sequence[Previewed]) -> list[PreviewRow]:
    """List the tokens of rows, where the loss counts, and how training treats each row."""
    return [
        PreviewRow(
            source=row.document.source,
            token_ids=row.document.tokens.tolist(),
            loss_mask=loss_mask(row.document),
            training=row.training,
            remark=row.remark,
        )
        for row in rows
    ]


def pieces_of(document: Document, tokenizer: ChatTokenizer) -> list[Piece]:
    """Split a document into its tokens, with the text of each.

    Tokens that hold parts of one character are put together, if they agree on the loss.
    """
    return list(_pieces(document.tokens.tolist(), loss_mask(document), _Decoder(tokenizer)))


def shown_parts(
    document: Document, tokenizer: ChatTokenizer
) -> tuple[list[Piece], Gap | None, list[Piece]]:
    """Return the pieces of a document up to a gap, the gap, and the pieces after it.

    Only a document longer than MOST_TOKENS has a gap: no browser opens a page of millions of
    tokens.
    """
    ids, learnt = document.tokens.tolist(), loss_mask(document)
    decoder = _Decoder(tokenizer)
    if len(ids) <= MOST_TOKENS:
        return list(_pieces(ids, learnt, decoder)), None, []
    first, last = MOST_TOKENS // 2, len(ids) - MOST_TOKENS // 2
    gap = Gap(last - first, sum(learnt[first:last]))
    before = list(_pieces(ids[:first], learnt[:first], decoder))
    return before, gap, list(_pieces(ids[last:], learnt[last:], decoder))


def loss_mask(document: Document) -> list[bool]:
    """Mark the tokens in the loss; the first has nothing before it and never counts."""
    return [False, *document.supervised[1:].tolist()][: len(document.tokens)]


class _Decoder:
    """Decoder of ids within a line: tokenizers drop the space of a text's first token."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode_text("a")
        self._skipped = len(tokenizer.decode(self._anchor))

    def text(self, ids: Sequence[int], *, with_special: bool = True) -> str:
        """Decode ids that stand between others."""
        joined = [*self._anchor, *ids]
        return self._tokenizer.decode(joined, skip_special_tokens=not with_special)[self._skipped :]

    def is_special(self, token: int, text: str) -> bool:
        """Return whether an id stands for a special token."""
        return bool(text) and not self.text([token], with_special=False)


def _pieces(ids: list[int], learnt: list[bool], decoder: _Decoder) -> Iterator[Piece]:
    at = 0
    while at < len(ids):
        window = learnt[at : at + _MOST_JOINED]
        alike = len(list(itertools.takewhile(window[0].__eq__, window)))
        text, taken = _whole(ids[at : at + alike], decoder)
        is_special = taken == 1 and decoder.is_special(ids[at], text)
        yield Piece(tuple(ids[at : at + taken]), text, learnt[at], is_special)
        at += taken


def _whole(ids: Sequence[int], decoder: _Decoder) -> tuple[str, int]:
    """Return the text of the fewest ids that make whole characters, and their number."""
    text, taken = decoder.text(ids[:1]), 1
    if not text.endswith("\ufffd"):
        return text, taken
    for count in range(2, len(ids) + 1):
        joined = decoder.text(ids[:count])
        if "\ufffd" not in joined:
            return joined, count
        # The data may hold U+FFFD itself, which then is whole with the last of its bytes.
        if joined.count("\ufffd") == 1 and joined.endswith("\ufffd"):
            text, taken = joined, count
    return text, taken


def visible(text: str, *, line_end: str = _LINE_END + "\n") -> str:
    """Make spaces, tabs, line ends and characters without a shape visible."""
    return "".join(_visible(character, line_end) for character in text)


def _visible(character: str, line_end: str) -> str:
    if character == "\n":
        return line_end
    if character in " \t":
        return _SPACE if character == " " else _TAB
    # Controls could drive the terminal; formats such as U+202E turn text around.
    if character in _SIGNS or unicodedata.category(character) in _SHAPELESS:
        return f"<U+{ord(character):04X}>"
    return character


def summary(document: Document) -> str:
    """Describe a document: its source, its number of tokens, and the share in the loss."""
    count, total = sum(loss_mask(document)), len(document.tokens)
    return f"{document.source}  {total:,} tokens, {count:,} in the loss ({count / total:.1%})"


def print_preview(
    documents: Sequence[Document],
    tokenizer: ChatTokenizer,
    console: Console,
    remarks: Sequence[str] = (),
) -> None:
    """Print documents with the loss in green and special tokens in magenta.

    Without colours, what is in the loss stands in \u27e6 \u27e7, and text that reads like a marker
    begins with the number of its first character, so that it cannot be taken for a special token.

    Args:
        documents: in order.
        tokenizer: of the documents.
        console: where to.
        remarks: on each document, or empty.
    """
    has_colour = console.color_system is not None and not console.no_color
    written = _coloured if has_colour else _bracketed
    for document, remark in zip(documents, remarks or itertools.repeat(""), strict=False):
        console.print(Text(summary(document), style="bold"), soft_wrap=True)
        if remark:
            console.print(Text(remark), soft_wrap=True)
        before, gap, after = shown_parts(document, tokenizer)
        console.print(written(before), soft_wrap=True)
        if gap is not None:
            console.print(Text(str(gap), style="italic"), soft_wrap=True)
            console.print(written(after), soft_wrap=True)
        console.print()


def _coloured(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for i, piece in enumerate(pieces):
        text.append(visible(piece.text), _STYLES[piece.is_learnt, piece.is_special][i % 2])
    return text


def _bracketed(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for is_learnt, run in itertools.groupby(pieces, key=lambda piece: piece.is_learnt):
        joined = "".join(map(_written, _alike(run)))
        text.append(f"{_OPENING}{joined}{_CLOSING}" if is_learnt else joined)
    return text


def _alike(pieces: Iterable[Piece]) -> Iterator[tuple[bool, str]]:
    """Yield runs of tokens: whether the run is special, and its text."""
    for is_special, run in itertools.groupby(pieces, key=lambda piece: piece.is_special):
        yield is_special, "".join(piece.text for piece in run)


def _written(run: tuple[bool, str]) -> str:
    is_special, text = run
    seen = visible(text)
    return seen if is_special else _MARKER.sub(_as_text, seen)


def _as_text(marker: re.Match[str]) -> str:
    first, rest = marker.group()[0], marker.group()[1:]
    return f"<U+{ord(first):04X}>{rest}"


def write_preview(
    path: Path,
    documents: Sequence[Document],
    tokenizer: ChatTokenizer,
    title: str,
    remarks: Sequence[str] = (),
) -> None:
    """Write documents as a page of its own, without scripts; each token shows its id on hover.

    Args:
        path: the file.
        documents: in order.
        tokenizer: of the documents.
        title: of the page.
        remarks: on each document, or empty.

    Raises:
        StorageError: when the file cannot be written.
    """
    page = render_page(
        "preview.html.jinja",
        title=title,
        documents=[
            _page_document(document, tokenizer, remark)
            for document, remark in zip(documents, remarks or itertools.repeat(""), strict=False)
        ],
        space=_SPACE,
        line_end=_LINE_END,
        tab=_TAB,
    )
    replace_file(path, page)


class _PageToken(NamedTuple):
    """A token, or the few of one character, on the page."""

    classes: str
    ids: str
    lines: list[str]


class _PageDocument(NamedTuple):
    """A document on the page."""

    summary: str
    remark: str
    before: list[_PageToken]
    gap: str
    after: list[_PageToken]


def _page_document(document: Document, tokenizer: ChatTokenizer, remark: str) -> _PageDocument:
    before, gap, after = shown_parts(document, tokenizer)
    return _PageDocument(
        summary(document),
        remark,
        [_page_token(piece) for piece in before],
        "" if gap is None else str(gap),
        [_page_token(piece) for piece in after],
    )


def _page_token(piece: Piece) -> _PageToken:
    classes = "t" + (" l" if piece.is_learnt else "") + (" s" if piece.is_special else "")
    shown = visible(piece.text)
    if piece.text and unicodedata.combining(piece.text[0]):
        # Alone in its span, an accent has nothing to stand on.
        shown = _DOTTED_CIRCLE + shown
    return _PageToken(classes, " ".join(map(str, piece.ids)), shown.split("\n"))
