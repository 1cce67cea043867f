"""Which documents form which optimizer step: a pure function of data, seed and config.

Neither the backend nor the number of ranks has a say; the hash of the plan is logged.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from phi3_lora.data.dataset import documents_digest
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
        self._lengths = [len(d.tokens) for d in documents]
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._packing = packing
        self._max_length = max_length
        self._digest = documents_digest(documents)
        self._cached: tuple[int, list[tuple[int, ...]]] = (-1, [])
        self.steps_per_epoch = len(self._epoch(0))
        self.total_steps = (
            max_steps if max_steps > 0 else math.ceil(num_epochs * self.steps_per_epoch)
        )

    def step(self, number: int) -> Step:
        """The number-th step, from 1."""
        # Packing depends on lengths alone, so every epoch has the same number of steps.
        epoch, within = divmod(number - 1, self.steps_per_epoch)
        groups = self._epoch(epoch)
        return Step(number, epoch + (within + 1) / len(groups), groups[within])

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The steps of an epoch; the last, shorter one is kept."""
        if self._cached[0] != epoch:
            order = permutation(self._seed, "epoch", epoch, size=len(self._lengths))
            rows = self._pack(order) if self._packing else [(int(i),) for i in order]
            size = self._rows_per_step
            groups = [
                tuple(i for row in rows[start : start + size] for i in row)
                for start in range(0, len(rows), size)
            ]
            self._cached = (epoch, groups)
        return self._cached[1]

    def _pack(self, order: np.ndarray) -> list[tuple[int, ...]]:
        """Whole documents into rows by best fit, longest first; ties in the epoch's order.

        The rows are then put in the order of their first document in the epoch's order, so that
        steps do not run from long to short.

        Source: best-fit decreasing, Johnson (1973), Near-optimal bin packing algorithms.
        """
        place = {int(document): i for i, document in enumerate(order)}
        longest_first = sorted(place, key=lambda d: (-self._lengths[d], place[d]))
        rows: list[list[int]] = []
        # (free tokens, row), sorted: the first entry that is large enough is the tightest.
        free: list[tuple[int, int]] = []
        for document in longest_first:
            length = self._lengths[document]
            found = bisect.bisect_left(free, (length, -1))
            if found < len(free):
                room, row = free.pop(found)
            else:
                room, row = self._max_length, len(rows)
                rows.append([])
            rows[row].append(document)
            bisect.insort(free, (room - length, row))
        ordered = [tuple(sorted(row, key=place.__getitem__)) for row in rows]
        return sorted(ordered, key=lambda row: place[row[0]])

    def steps(self, after: int = 0) -> Iterator[Step]:
        """The steps that follow the after-th one."""
        for number in range(after + 1, self.total_steps + 1):
            yield self.step(number)

    def hash(self) -> str:
        """sha256 over every (step, document) pair and over the documents' ids and masks."""
        digest = hashlib.sha256(self._digest.encode())
        for step in self.steps():
            for document in step.documents:
                digest.update(f"{step.number} {document};".encode())
        return digest.hexdigest()


def rank_share(documents: Sequence[int], rank: int, world_size: int) -> tuple[int, ...]:
    """The documents of a step that one process computes; together all ranks cover each once."""
    return tuple(documents[rank::world_size])
