"""Search for documents that are in both the training and the validation data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.store import document_lengths


class DocumentIndex:
    """An index of documents by their tokens; the loss masks are ignored."""

    def __init__(self, documents: Sequence[Document]) -> None:
        """Index documents; each takes 60 bytes and its source."""
        self._sources = {_key(document): document.source for document in documents}
        self._lengths = np.unique(document_lengths(documents))

    def __len__(self) -> int:
        """Return the number of different documents."""
        return len(self._sources)

    def among(self, documents: Sequence[Document]) -> Iterator[tuple[Document, str]]:
        """Find the documents that are in the index; give the source of the equal document."""
        # The length is a cheap first test: it is known without reading the document.
        for i in np.flatnonzero(np.isin(document_lengths(documents), self._lengths)).tolist():
            source = self._sources.get(_key(documents[i]))
            if source is not None:
                yield documents[i], source


def overlap_note(train: Sequence[Document], valid: Sequence[Document]) -> str | None:
    """Return a note on validation documents that are also trained on; None if there are none."""
    known = DocumentIndex(valid)
    first: tuple[Document, str] | None = None
    shared: set[str] = set()
    for document, source in known.among(train):
        first = first or (document, source)
        shared.add(source)
    if first is None:
        return None
    return (
        f"validation data: {len(shared):,} of {len(known):,} different rows are in the training "
        f"data, too, so its loss is too low (first {first[1]}, trained on as "
        f"{first[0].source}); phi3-lora data split keeps equal rows on one side"
    )


def _key(document: Document) -> bytes:
    return hashlib.blake2b(document.tokens.tobytes(), digest_size=16).digest()
