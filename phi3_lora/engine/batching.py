"""Division of a step's documents among ranks and into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from phi3_lora.engine.packing import packed_rows
from phi3_lora.engine.protocol import Batch

T = TypeVar("T")
Integers = NDArray[np.signedinteger[Any]]


def micro_batches(batch: Batch, max_tokens: int) -> list[Batch]:
    """Divide a batch into few parts of whole documents.

    The longest document is placed first, each in the fullest part that has room. Within a part,
    the documents keep their order.

    Args:
        batch: the documents.
        max_tokens: most tokens in a part; a longer document is a part alone.
    """
    parts = micro_batch_documents(np.diff(batch.doc_starts), max_tokens)
    return [batch] if len(parts) == 1 else [chosen_documents(batch, part) for part in parts]


def micro_batch_documents(lengths: Integers, max_tokens: int) -> list[Integers]:
    """Return the indices of the documents in each part; only the lengths decide."""
    lengths = lengths.astype(np.int64)
    rows = packed_rows(np.arange(len(lengths)), lengths, max_tokens)
    return np.split(rows.documents, rows.starts[1:-1])


def split_batch(batch: Batch, max_tokens: int) -> list[Batch]:
    """Divide a batch into parts of consecutive whole documents.

    Args:
        batch: the documents.
        max_tokens: most tokens in a part; a longer document is a part alone.
    """
    starts = batch.doc_starts
    parts, first = [], 0
    for last in range(1, len(starts)):
        if starts[last] - starts[first] > max_tokens and last - 1 > first:
            parts.append(documents_between(batch, first, last - 1))
            first = last - 1
    if first < len(starts) - 1:
        parts.append(documents_between(batch, first, len(starts) - 1))
    return parts


def documents_between(batch: Batch, first: int, last: int) -> Batch:
    """Return the documents first .. last - 1 as a batch."""
    a, b = int(batch.doc_starts[first]), int(batch.doc_starts[last])
    starts = (batch.doc_starts[first : last + 1] - a).astype(np.int32)
    return Batch(batch.tokens[a:b], batch.targets[a:b], batch.loss_mask[a:b], starts)


def chosen_documents(batch: Batch, documents: Integers) -> Batch:
    """Return the documents with the given indices as a batch."""
    lengths = np.diff(batch.doc_starts)[documents]
    starts = np.append(0, np.cumsum(lengths)).astype(np.int32)
    offsets = batch.doc_starts[documents] - starts[:-1]
    index = np.arange(starts[-1]) + np.repeat(offsets, lengths)
    return Batch(batch.tokens[index], batch.targets[index], batch.loss_mask[index], starts)


def per_document(values: np.ndarray, batch: Batch) -> np.ndarray:
    """Sum the values of the supervised tokens over each document, (D,).

    Args:
        values: one number for each True in loss_mask, in order.
        batch: the documents.
    """
    full = np.zeros(len(batch.tokens), dtype=values.dtype)
    full[batch.loss_mask] = values
    return np.add.reduceat(full, batch.doc_starts[:-1])


def rank_share(documents: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return the documents of a step that one process computes.

    Each document of the step belongs to exactly one rank.
    """
    return documents[rank::world_size]
