"""The preview of documents as an HTML page."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from phi3_lora.data.chat.tokenizer import ChatTokenizer, Document
from phi3_lora.report.pages import render_page
from phi3_lora.report.preview import LINE_END, SPACE, TAB, Piece, shown_parts, summary, visible
from phi3_lora.storage.atomic import replace_file

_DOTTED_CIRCLE = "\u25cc"
"""Shown under an accent that begins a token."""


def write_preview(
    path: Path,
    documents: Sequence[Document],
    tokenizer: ChatTokenizer,
    title: str,
    remarks: Sequence[str] = (),
) -> None:
    """Write documents as one HTML file without scripts; each token shows its id on hover.

    Args:
        path: the file to write.
        documents: the documents to show, in order.
        tokenizer: the tokenizer that encoded them.
        title: the title of the page.
        remarks: a remark on each document, which may be empty; none by default.

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
        space=SPACE,
        line_end=LINE_END,
        tab=TAB,
    )
    replace_file(path, page)


class _PageToken(NamedTuple):
    """A piece of a document on the page."""

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
        # A span separates an accent from its letter.
        shown = _DOTTED_CIRCLE + shown
    return _PageToken(classes, " ".join(map(str, piece.ids)), shown.split("\n"))
