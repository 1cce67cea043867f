"""Documents token by token, coloured by whether the loss counts, on a terminal and as a page."""

from __future__ import annotations

import html
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from phi3_lora.data.tokenizer import ChatTokenizer, Document
from phi3_lora.storage import replace_file

_MOST_JOINED = 4
"""Tokens that one character of UTF-8 can take."""
_SPACE, _LINE_END, _TAB = "\u00b7", "\u21b5", "\u2192"
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
    """As it is, with a special token as its name."""
    is_learnt: bool
    is_special: bool


def pieces_of(document: Document, tokenizer: ChatTokenizer) -> list[Piece]:
    """A document's tokens with the text of each.

    Tokens that hold parts of one character are put together, if they agree on the loss.
    """
    return list(_pieces(document.tokens.tolist(), loss_mask(document), _Decoder(tokenizer)))


def loss_mask(document: Document) -> list[bool]:
    """Whether the loss counts each token; the first has nothing before it and never counts."""
    return [False, *document.supervised[1:].tolist()][: len(document.tokens)]


class _Decoder:
    """Texts of ids within a line: tokenizers drop the space of a text's first token."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode_text("a")
        self._skipped = len(tokenizer.decode(self._anchor))

    def text(self, ids: Sequence[int], *, with_special: bool = True) -> str:
        """The text of ids in the midst of others."""
        joined = [*self._anchor, *ids]
        return self._tokenizer.decode(joined, skip_special_tokens=not with_special)[self._skipped :]

    def is_special(self, token: int, text: str) -> bool:
        """Whether an id stands for a special token."""
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
    """The text of the fewest ids that are whole characters, and how many ids they are."""
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
    """Text with spaces, tabs, line ends and all that has no shape or moves others made visible."""
    return "".join(_visible(character, line_end) for character in text)


def _visible(character: str, line_end: str) -> str:
    if character == "\n":
        return line_end
    if character in " \t":
        return _SPACE if character == " " else _TAB
    # Controls could drive the terminal; formats such as U+202E turn text around.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"<U+{ord(character):04X}>"
    return character


def summary(document: Document) -> str:
    """Where a document is from, its tokens, and how many of them are in the loss."""
    count, total = sum(loss_mask(document)), len(document.tokens)
    return f"{document.source}  {total:,} tokens, {count:,} in the loss ({count / total:.1%})"


def print_preview(
    documents: Sequence[Document], tokenizer: ChatTokenizer, console: Console
) -> None:
    """Print documents with the loss in green and special tokens in magenta.

    Without colours, what is in the loss stands in \u27e6 \u27e7.
    """
    has_colour = console.color_system is not None and not console.no_color
    for document in documents:
        console.print(Text(summary(document), style="bold"), soft_wrap=True)
        pieces = pieces_of(document, tokenizer)
        console.print(_coloured(pieces) if has_colour else _bracketed(pieces), soft_wrap=True)
        console.print()


def _coloured(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for i, piece in enumerate(pieces):
        text.append(visible(piece.text), _STYLES[piece.is_learnt, piece.is_special][i % 2])
    return text


def _bracketed(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for is_learnt, run in itertools.groupby(pieces, key=lambda piece: piece.is_learnt):
        joined = "".join(visible(piece.text) for piece in run)
        text.append(f"\u27e6{joined}\u27e7" if is_learnt else joined)
    return text


_CSS = """
body { font: 15px/1.9 ui-monospace, monospace; margin: 2em; color: #222; background: #fff; }
h1, h2, p { font-family: system-ui, sans-serif; line-height: 1.4; }
h1 { font-size: 1.3em; }
h2 { font-size: 1em; margin: 1.6em 0 .4em; }
.row { overflow-wrap: anywhere; unicode-bidi: isolate; }
.t { padding: 2px 0; border-left: 1px solid #c4c4c4; background: #f1f1f1; }
.t.l { background: #b7e4bd; border-color: #5aa867; }
.t.s { color: #9b1fa3; font-weight: 600; }
""".strip()


def write_preview(
    path: Path, documents: Sequence[Document], tokenizer: ChatTokenizer, title: str
) -> None:
    """Write documents as a page of its own, without scripts; each token shows its id on hover.

    Raises:
        StorageError: when the file cannot be written.
    """
    rows = "\n".join(
        f'<h2>{html.escape(summary(d))}</h2>\n<div class="row">'
        + "".join(map(_span, pieces_of(d, tokenizer)))
        + "</div>"
        for d in documents
    )
    name = html.escape(title)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{name}</title>\n<style>\n{_CSS}\n</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        '<p><span class="t l">in the loss</span> <span class="t">not in the loss</span> '
        f'<span class="t s">special token</span> &nbsp; {_SPACE} space, {_LINE_END} line end, '
        f"{_TAB} tab; the id of a token is shown when the pointer rests on it.</p>\n"
        f"{rows}\n</body>\n</html>\n"
    )
    # Python keeps an undecodable byte of a file name as a lone surrogate.
    replace_file(path, page.encode("utf-8", errors="replace"))


def _span(piece: Piece) -> str:
    classes = "t" + (" l" if piece.is_learnt else "") + (" s" if piece.is_special else "")
    ids = " ".join(map(str, piece.ids))
    text = html.escape(visible(piece.text)).replace("\n", "<br>")
    # A place where a line may break, since the spaces between tokens are no longer spaces.
    return f'<span class="{classes}" title="{ids}">{text}</span><wbr>'
