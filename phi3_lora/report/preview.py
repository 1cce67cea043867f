"""Documents split into visible tokens, each with its place in or outside the loss."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.data.options import Outcome
from phi3_lora.data.quality.checks import Previewed

MOST_TOKENS = 4096
"""Most tokens of a document that are shown: half of them from its start, half from its end."""
_MOST_JOINED = 4
"""Most tokens of one character in UTF-8."""
SPACE, LINE_END, TAB = "\u00b7", "\u21b5", "\u2192"
OPENING, CLOSING = "\u27e6", "\u27e7"
_SIGNS = SPACE + LINE_END + TAB + OPENING + CLOSING
"""Signs that replace other characters; one that is in the data is shown by its number."""
_SHAPELESS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")


class Piece(NamedTuple):
    """One token, or the tokens that make up one character together."""

    ids: tuple[int, ...]
    text: str
    """The unchanged text; the name of a special token."""
    is_learnt: bool
    is_special: bool


class Gap(NamedTuple):
    """The tokens in the middle of a long document, which are not shown."""

    num_tokens: int
    num_learnt: int

    def __str__(self) -> str:
        """Return the text to show instead of the tokens."""
        return f"[{self.num_tokens:,} tokens not shown, {self.num_learnt:,} of them in the loss]"


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row of a preview."""

    source: str
    """File and line."""
    token_ids: list[int]
    loss_mask: list[bool]
    training: Outcome
    """The treatment of the row in training; error stops the run."""
    remark: str
    """Why training changes or drops the row; empty if the row is kept."""

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

    Tokens that hold parts of one character become one piece if all or none are in the loss.
    """
    return list(_pieces(document.tokens.tolist(), loss_mask(document), _Decoder(tokenizer)))


def shown_parts(
    document: Document, tokenizer: ChatTokenizer
) -> tuple[list[Piece], Gap | None, list[Piece]]:
    """Return the pieces of a document up to a gap, the gap, and the pieces after it.

    Only a document of more than MOST_TOKENS has a gap, since no browser opens a page of millions
    of tokens.
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
    """Return which tokens are in the loss; the first token never is, as nothing predicts it."""
    return [False, *document.supervised[1:].tolist()][: len(document.tokens)]


class _Decoder:
    """Decodes ids after an anchor, since tokenizers drop the space before a text's first token."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode_text("a")
        self._skipped = len(tokenizer.decode(self._anchor))

    def text(self, ids: Sequence[int], *, with_special: bool = True) -> str:
        """Decode ids as in the middle of a text."""
        joined = [*self._anchor, *ids]
        return self._tokenizer.decode(joined, skip_special_tokens=not with_special)[self._skipped :]

    def is_special(self, token: int, text: str) -> bool:
        """Return whether an id is a special token."""
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
        # The data may hold U+FFFD itself; it is complete with the last of its bytes.
        if joined.count("\ufffd") == 1 and joined.endswith("\ufffd"):
            text, taken = joined, count
    return text, taken


def visible(text: str, *, line_end: str = LINE_END + "\n") -> str:
    """Replace spaces, tabs, line ends and characters without a shape by visible signs."""
    return "".join(_visible(character, line_end) for character in text)


def _visible(character: str, line_end: str) -> str:
    if character == "\n":
        return line_end
    if character in " \t":
        return SPACE if character == " " else TAB
    # A control character could drive the terminal; one such as U+202E reverses the text.
    if character in _SIGNS or unicodedata.category(character) in _SHAPELESS:
        return f"<U+{ord(character):04X}>"
    return character


def summary(document: Document) -> str:
    """Describe a document by its source, its number of tokens and their share in the loss."""
    count, total = sum(loss_mask(document)), len(document.tokens)
    return f"{document.source}  {total:,} tokens, {count:,} in the loss ({count / total:.1%})"
