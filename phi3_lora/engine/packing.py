"""Whole documents in rows: each in its own, or several that share one.

No document is ever split.
"""

from __future__ import annotations

import bisect
import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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
