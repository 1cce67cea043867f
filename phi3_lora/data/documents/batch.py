"""Conversion of documents to a batch for an engine, and the digest of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from phi3_lora.arrays import Bool, Int32
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.store import DocumentStore
from phi3_lora.engine.protocol import Batch


def make_batch(documents: Sequence[Document]) -> Batch:
    """Join documents end to end, with each token's target and loss mask."""
    lengths = [len(d.tokens) for d in documents]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = np.concatenate([d.tokens for d in documents]).astype(np.int32)
    supervised = np.concatenate([d.supervised for d in documents])
    targets = np.append(tokens[1:], 0).astype(np.int32)
    mask = np.append(supervised[1:], False)
    last = starts[1:] - 1
    targets[last], mask[last] = 0, False
    return Batch(tokens, targets, mask, starts)


def documents_digest(documents: Sequence[Document]) -> str:
    """Return the sha256 of all token ids and masks, in order."""
    digest = hashlib.sha256()
    for tokens, supervised in _arrays(documents):
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(tokens.astype("<i4", copy=False).tobytes())
        digest.update(np.packbits(supervised).tobytes())
    return digest.hexdigest()


def _arrays(documents: Sequence[Document]) -> Iterator[tuple[Int32, Bool]]:
    if isinstance(documents, DocumentStore):
        yield from (documents.store.arrays(row) for row in documents.rows.tolist())
        return
    for document in documents:
        yield document.tokens, document.supervised
