"""Which documents form which optimizer step: a pure function of data, seed and config.

Neither the backend nor the number of ranks has a say; the hash of the plan is logged.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.dataset import documents_digest
from phi3_lora.data.store import document_lengths
from phi3_lora.data.tokenizer import Document
from phi3_lora.seeding import permutation


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step."""

    number: int
    """From 1."""
    epoch: float
    """Epochs finished after this step."""
    documents: tuple[int, ...]
    """Indices into the data set."""


class _Rows(NamedTuple):
    """An epoch's rows: single documents, or several that are packed."""

    documents: NDArray[np.int64]
    """(D,) row after row."""
    starts: NDArray[np.int64]
    """(R + 1,) row r is documents[starts[r]:starts[r + 1]]."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.starts) - 1


class Plan:
    """The steps of a run, made epoch by epoch."""

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        rows_per_step: int,
        num_epochs: float,
        max_steps: int,
        seed: int,
        packing: bool = False,
        max_length: int = 0,
    ) -> None:
        """Lay out the run.

        Args:
            documents: the training documents.
            rows_per_step: documents a step, or rows of max_length tokens with packing.
            num_epochs: passes over the data, used when max_steps is not positive.
            max_steps: optimizer steps; positive wins over num_epochs.
            seed: of the order within each epoch.
            packing: whether a row takes as many whole documents as fit into max_length.
            max_length: tokens a row, for packing.
        """
        self._lengths = document_lengths(documents)
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._packing = packing
        self._max_length = max_length
        self._digest = documents_digest(documents)
        self._cached = (-1, _Rows(np.arange(0), np.arange(1)))
        self.steps_per_epoch = math.ceil(self._epoch(0).num_rows / rows_per_step)
        self.total_steps = (
            max_steps if max_steps > 0 else math.ceil(num_epochs * self.steps_per_epoch)
        )

    def step(self, number: int) -> Step:
        """The number-th step, from 1."""
        # Packing depends on lengths alone, so every epoch has the same number of steps.
        epoch, within = divmod(number - 1, self.steps_per_epoch)
        rows = self._epoch(epoch)
        first = within * self._rows_per_step
        # The last, shorter step is kept.
        last = min(first + self._rows_per_step, rows.num_rows)
        documents = rows.documents[rows.starts[first] : rows.starts[last]]
        epochs = epoch + (within + 1) / self.steps_per_epoch
        return Step(number, epochs, tuple(documents.tolist()))

    def _epoch(self, epoch: int) -> _Rows:
        if self._cached[0] != epoch:
            order = permutation(self._seed, "epoch", epoch, size=len(self._lengths))
            if self._packing:
                rows = _packed(order, self._lengths, self._max_length)
            else:
                rows = _Rows(order, np.arange(len(order) + 1))
            self._cached = (epoch, rows)
        return self._cached[1]

    def steps(self, after: int = 0) -> Iterator[Step]:
        """The steps that follow the after-th one."""
        for number in range(after + 1, self.total_steps + 1):
            yield self.step(number)

    def hash(self) -> str:
        """sha256 over every (step, document) pair and over the documents' ids and masks."""
        digest = hashlib.sha256(self._digest.encode())
        for step in self.steps():
            pairs = [f"{step.number} {document};" for document in step.documents]
            digest.update("".join(pairs).encode())
        return digest.hexdigest()


def _packed(order: NDArray[np.int64], lengths: NDArray[np.int64], max_length: int) -> _Rows:
    """Whole documents into rows by best fit, longest first; ties in the epoch's order.

    The rows are then put in the order of their first document in the epoch's order, so that
    steps do not run from long to short.

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
    starts = np.flatnonzero(np.diff(row_of[documents], prepend=-1, append=-1))
    return _Rows(documents, starts)


def rank_share(documents: Sequence[int], rank: int, world_size: int) -> tuple[int, ...]:
    """The documents of a step that one process computes; together all ranks cover each once."""
    return tuple(documents[rank::world_size])
