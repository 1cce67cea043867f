"""The preview of documents on a terminal: green is in the loss, magenta is a special token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.report.preview import CLOSING, OPENING, Piece, shown_parts, summary, visible

_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<unk>")
"""Text that reads like a special token of the family."""
_STYLES = {
    (True, False): ("black on green", "black on bright_green"),
    (True, True): ("bold magenta on green", "bold magenta on bright_green"),
    (False, False): ("default", "default on grey23"),
    (False, True): ("bold magenta", "bold magenta on grey23"),
}
"""(in the loss, special) -> two styles, which alternate from token to token."""


def print_preview(
    documents: Sequence[Document],
    tokenizer: ChatTokenizer,
    console: Console,
    remarks: Sequence[str] = (),
) -> None:
    """Print documents with the loss in green and special tokens in magenta.

    Without colours, the tokens in the loss are in \u27e6 \u27e7. Text that looks like a special
    token begins with the number of its first character, so the two cannot be confused.

    Args:
        documents: the documents to print, in order.
        tokenizer: the tokenizer that encoded them.
        console: the console to print on.
        remarks: a remark on each document, which may be empty; none by default.
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
        text.append(f"{OPENING}{joined}{CLOSING}" if is_learnt else joined)
    return text


def _alike(pieces: Iterable[Piece]) -> Iterator[tuple[bool, str]]:
    """Yield runs of tokens, as (True if the tokens are special, their text)."""
    for is_special, run in itertools.groupby(pieces, key=lambda piece: piece.is_special):
        yield is_special, "".join(piece.text for piece in run)


def _written(run: tuple[bool, str]) -> str:
    is_special, text = run
    seen = visible(text)
    return seen if is_special else _MARKER.sub(_as_text, seen)


def _as_text(marker: re.Match[str]) -> str:
    first, rest = marker.group()[0], marker.group()[1:]
    return f"<U+{ord(first):04X}>{rest}"
