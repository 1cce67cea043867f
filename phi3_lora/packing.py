"""Whole documents in rows: each in its own, or several that share one.

No document is ever split.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.seeding import permutation


class Rows(NamedTuple):
    """Documents in rows."""

    documents: NDArray[np.int64]
    """(D,) row after row."""
    starts: NDArray[np.int64]
    """(R + 1,) row r is documents[starts[r]:starts[r + 1]]."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.starts) - 1


@dataclass(frozen=True, slots=True)
class FirstSteps:
    """The steps of an epoch, or of a stream's first block, by what they hold."""

    rows: Rows
    lengths: NDArray[np.int64]
    """(D,) tokens of each document."""
    rows_per_step: int
    row_tokens: int | None
    """Tokens that fit into a row; None where each row is one document."""

    def document_lengths(self, limit: int) -> Iterator[NDArray[np.int64]]:
        """Tokens of each document of the first steps, at most so many."""
        starts = np.append(self.rows.starts[:: self.rows_per_step], self.rows.starts[-1])
        for start, end in itertools.islice(itertools.pairwise(starts), limit):
            if end > start:
                yield self.lengths[self.rows.documents[start:end]]

    def facts(self) -> dict[str, Any]:
        """`step_tokens` (least, mean and most) and `row_fill`, the share that tokens take."""
        ordered = self.lengths[self.rows.documents]
        row_lengths = np.add.reduceat(ordered, self.rows.starts[:-1]) if len(ordered) else ordered
        if not len(row_lengths):
            return {"step_tokens": None, "row_fill": None}
        every = np.arange(0, len(row_lengths), self.rows_per_step)
        steps = np.add.reduceat(row_lengths, every)
        figures = {"least": steps.min(), "mean": steps.mean().round(), "most": steps.max()}
        fill = None
        if self.row_tokens is not None:
            fill = float(row_lengths.mean() / self.row_tokens)
        return {"step_tokens": {k: int(v) for k, v in figures.items()}, "row_fill": fill}

    def padding(self, computed_tokens: Callable[[NDArray[np.int64]], int]) -> float:
        """Share of what a device computes on that is padding, of at most 1,000 steps.

        Args:
            computed_tokens: the engine's.
        """
        needed = computed = 0
        for lengths in self.document_lengths(1000):
            needed += int(lengths.sum())
            computed += computed_tokens(lengths)
        return 1 - needed / computed if computed else 0.0


def shuffled_rows(
    lengths: NDArray[np.int64], *, seed: int, part: tuple[int, ...], row_tokens: int | None
) -> Rows:
    """Documents in rows, in an order that nothing but the seed and the part decides.

    Args:
        lengths: (D,) tokens of each document.
        seed: of the run.
        part: numbers that tell what is shuffled from other parts of the run: its epoch first.
        row_tokens: a row takes as many documents as fit into so many tokens; None: one.
    """
    order = permutation(seed, "epoch", *part, size=len(lengths))
    if row_tokens is not None:
        return packed_rows(order, lengths, row_tokens)
    return Rows(order, np.arange(len(order) + 1))


def packed_rows(order: NDArray[np.int64], lengths: NDArray[np.int64], max_length: int) -> Rows:
    """Whole documents into rows by best fit, longest first; ties in the order given.

    The rows are then put in the order of their first document in that order, so that steps do not
    run from long to short.

    Source: best-fit decreasing, Johnson (1973), Near-optimal bin packing algorithms.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    row_of = np.empty_like(order)
    # Free tokens -> the rows that have as many, the first one on top; and those numbers, sorted.
    open_rows: dict[int, list[int]] = {}
    rooms: list[int] = []
    num_rows = 0
    for document in np.lexsort((place, -lengths)).tolist():
        length = int(lengths[document])
        # The smallest room that is large enough is the tightest.
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = heapq.heappop(open_rows[room])
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            room, row = max_length, num_rows
            num_rows += 1
        row_of[document] = row
        if room - length not in open_rows:
            bisect.insort(rooms, room - length)
        heapq.heappush(open_rows.setdefault(room - length, []), row)
    first = np.full(num_rows, len(order))
    np.minimum.at(first, row_of, place)
    documents = np.lexsort((place, first[row_of]))
    ends = np.flatnonzero(np.diff(row_of[documents], append=-1)) + 1
    return Rows(documents, np.append(0, ends))
