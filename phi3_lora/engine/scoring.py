"""Scores of documents, computed from a backend's scores of single positions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Bool, Float32
from phi3_lora.engine.batching import per_document, split_batch
from phi3_lora.engine.protocol import Batch, Scores


class RowScores(NamedTuple):
    """Scores of R chosen positions of a batch."""

    logprobs: NDArray[np.floating[Any]]
    """(R,) log-probability of each position's target."""
    is_correct: Bool
    """(R,) True where the target has the largest logit."""


ScoreRows = Callable[[Batch, NDArray[np.int64]], RowScores]
"""A backend's function that scores chosen positions of a batch, without dropout.

The batch fits the device's memory.
"""


def score_documents(score_rows: ScoreRows, batch: Batch, *, max_tokens: int) -> Scores:
    """Score each document's supervised tokens.

    Args:
        score_rows: the backend's scores of positions.
        batch: the documents.
        max_tokens: most tokens in one call of the backend; a longer document has its own call.
    """
    logprobs, correct = [np.zeros(0)], [np.zeros(0, np.int64)]
    for part in split_batch(batch, max_tokens):
        rows = np.flatnonzero(part.loss_mask)
        if not len(rows):
            continue
        scores = score_rows(part, rows)
        logprobs.append(scores.logprobs.astype(np.float64))
        correct.append(scores.is_correct.astype(np.int64))
    return Scores(
        per_document(-np.concatenate(logprobs), batch),
        per_document(np.concatenate(correct), batch),
        per_document(np.ones(int(batch.loss_mask.sum()), np.int64), batch),
    )


def target_logprobs(score_rows: ScoreRows, batch: Batch, *, max_tokens: int) -> Float32:
    """Return the log-probability of each target, (T,); 0 at each document's last position.

    Args:
        score_rows: the backend's scores of positions.
        batch: the documents.
        max_tokens: most tokens in one call of the backend; a longer document has its own call.
    """
    parts = split_batch(batch, max_tokens)
    found = [score_rows(part, np.arange(len(part.tokens))).logprobs for part in parts]
    result = np.concatenate(found).astype(np.float32)
    result[batch.doc_starts[1:] - 1] = 0.0
    return result


@contextlib.contextmanager
def forgetting_prefixes(
    changed: AbstractContextManager[None], forget: Callable[[], None]
) -> Iterator[None]:
    """Enter a context that changes the model; drop cached keys before and after.

    Args:
        changed: the context.
        forget: a function that drops the engine's cached keys of earlier sequences.
    """
    forget()
    try:
        with changed:
            yield
    finally:
        forget()
