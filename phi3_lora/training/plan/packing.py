"""The order of an epoch: documents in rows, rows in steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phi3_lora.engine.packing import Rows, packed_rows
from phi3_lora.engine.random_streams import permutation
from phi3_lora.training.plan.facts import StepFacts, StepTokens


@dataclass(frozen=True, slots=True)
class FirstSteps:
    """The sizes of the steps of the first epoch, or of the first block of a stream."""

    rows: Rows
    lengths: NDArray[np.int64]
    """(D,) tokens of each document."""
    rows_per_step: int
    row_tokens: int | None
    """Tokens that a row may have; None where each row is one document."""

    def document_lengths(self, limit: int) -> Iterator[NDArray[np.int64]]:
        """Yield the tokens of each document, step by step, for at most `limit` steps."""
        starts = np.append(self.rows.starts[:: self.rows_per_step], self.rows.starts[-1])
        for start, end in itertools.islice(itertools.pairwise(starts), limit):
            if end > start:
                yield self.lengths[self.rows.documents[start:end]]

    def facts(self) -> StepFacts:
        """Return the figures of the steps."""
        ordered = self.lengths[self.rows.documents]
        row_lengths = np.add.reduceat(ordered, self.rows.starts[:-1]) if len(ordered) else ordered
        if not len(row_lengths):
            return StepFacts(step_tokens=None, row_fill=None)
        every = np.arange(0, len(row_lengths), self.rows_per_step)
        steps = np.add.reduceat(row_lengths, every)
        tokens = StepTokens(
            least=int(steps.min()), mean=int(steps.mean().round()), most=int(steps.max())
        )
        if self.row_tokens is None:
            return StepFacts(step_tokens=tokens, row_fill=None)
        return StepFacts(step_tokens=tokens, row_fill=float(row_lengths.mean() / self.row_tokens))

    def padding(self, computed_tokens: Callable[[NDArray[np.int64]], int]) -> float:
        """Return the share of the computed tokens that are padding, in at most 1,000 steps.

        Args:
            computed_tokens: lengths of the documents of a step -> tokens that the engine computes
                on, padding included.
        """
        needed = computed = 0
        for lengths in self.document_lengths(1000):
            needed += int(lengths.sum())
            computed += computed_tokens(lengths)
        return 1 - needed / computed if computed else 0.0


def shuffled_rows(
    lengths: NDArray[np.int64], *, seed: int, part: tuple[int, ...], row_tokens: int | None
) -> Rows:
    """Shuffle documents and put them in rows.

    Args:
        lengths: (D,) tokens of each document.
        seed: seed of the run.
        part: numbers of the part of the data that is shuffled: its epoch, then its block. Each
            part has its own order.
        row_tokens: tokens that a row may have. A row takes as many whole documents as fit; with
            None it takes one document.
    """
    order = permutation(seed, "epoch", *part, size=len(lengths))
    if row_tokens is not None:
        return packed_rows(order, lengths, row_tokens)
    return Rows(order, np.arange(len(order) + 1))
