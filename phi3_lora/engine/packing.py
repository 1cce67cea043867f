"""Packing of whole documents into rows. No document is ever split."""

from __future__ import annotations

import bisect
import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Rows(NamedTuple):
    """D documents in R rows."""

    documents: NDArray[np.int64]
    """(D,) indices of the documents, row after row."""
    starts: NDArray[np.int64]
    """(R + 1,) row r is documents[starts[r]:starts[r + 1]]."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1


def packed_rows(order: NDArray[np.int64], lengths: NDArray[np.int64], max_length: int) -> Rows:
    """Pack whole documents into rows by best fit, the longest document first.

    Documents of equal length are packed in the given order. The rows are then sorted by the place
    of their first document in that order. Otherwise the first steps would have the longest rows.

    Args:
        order: (D,) indices of the documents, in the order of training.
        lengths: (D,) tokens of each document, by index.
        max_length: most tokens in a row; a longer document is a row alone.

    Source: best-fit decreasing, Johnson (1973), Near-optimal bin packing algorithms.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    row_of = np.empty_like(order)
    # Number of free tokens -> heap of the rows with that room, the first row on top.
    open_rows: dict[int, list[int]] = {}
    # The keys of open_rows, sorted.
    rooms: list[int] = []
    num_rows = 0
    for document in np.lexsort((place, -lengths)).tolist():
        length = int(lengths[document])
        # Best fit: the smallest room that is large enough.
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
