"""Documents that are in the training and in the validation data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.store import document_lengths


class DocumentIndex:
    """Documents, looked up by their tokens alone."""

    def __init__(self, documents: Sequence[Document]) -> None:
        """Remember documents: 60 bytes of each and where it comes from."""
        self._sources = {_key(document): document.source for document in documents}
        self._lengths = np.unique(document_lengths(documents))

    def __len__(self) -> int:
        """Documents that differ."""
        return len(self._sources)

    def among(self, documents: Sequence[Document]) -> Iterator[tuple[Document, str]]:
        """Find documents that are in the index, each with the source of its twin there."""
        # Reading a document takes longer than asking for its length.
        for i in np.flatnonzero(np.isin(document_lengths(documents), self._lengths)).tolist():
            source = self._sources.get(_key(documents[i]))
            if source is not None:
                yield documents[i], source


def overlap_note(train: Sequence[Document], valid: Sequence[Document]) -> str | None:
    """Return a note on validation documents that are trained on, too; None without any."""
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
        f"data, too, so that its loss comes out too low (first {first[1]}, trained on as "
        f"{first[0].source}); phi3-lora data split sets rows aside without that"
    )


def _key(document: Document) -> bytes:
    return hashlib.blake2b(document.tokens.tobytes(), digest_size=16).digest()
