"""The steps of a run that reads its data as it trains: the documents of each step.

Rows come in blocks. The seed, the epoch and the number of the block alone decide the order of a
block's documents. A checkpoint therefore keeps only the position in the stream, and data that fits
into one block gives the steps of Plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.data.documents.store import document_lengths, num_loss_tokens
from phi3_lora.data.documents.stream import Stopped, StreamedRows
from phi3_lora.training.plan.facts import BlockFacts, PlanFacts
from phi3_lora.training.plan.packing import FirstSteps
from phi3_lora.training.plan.position import StreamPosition, damaged_position
from phi3_lora.training.plan.protocol import Step, step_pairs
from phi3_lora.training.plan.stream_rows import PlanRow, RowReader


class StreamedPlan:
    """The steps of a run that reads its data as it trains."""

    def __init__(
        self,
        rows: StreamedRows,
        *,
        rows_per_step: int,
        max_steps: int,
        seed: int,
        row_tokens: int | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Read the first block.

        Args:
            rows: the training data.
            rows_per_step: documents of a step; with row_tokens, rows of several documents.
            max_steps: optimizer steps.
            seed: seed of the order within each block.
            row_tokens: tokens that a row may have. A row takes as many whole documents of a block
                as fit; with None it takes one document.
            note: receives texts that the user should see.

        Raises:
            DataError: when there is no row, or a row cannot be used.
        """
        self.total_steps = max_steps
        self._rows = rows
        self._rows_per_step = rows_per_step
        self._reader = RowReader(rows, seed=seed, row_tokens=row_tokens, note=note)
        first = self._reader.first_block()
        lengths = document_lengths(first.documents)
        self._first_facts = BlockFacts(
            buffer_size=rows.buffer_size,
            num_documents=len(first.documents),
            num_tokens=int(lengths.sum()),
            loss_tokens=num_loss_tokens(first.documents),
        )
        in_rows = self._reader.in_rows(lengths, (0,))
        self.first_steps = FirstSteps(in_rows, lengths, rows_per_step, row_tokens)
        settings = [seed, rows_per_step, row_tokens, rows.buffer_size]
        hashed = f"{settings} {first.rows_hash} {documents_digest(first.documents)}"
        self._hash = hashlib.sha256(hashed.encode()).hexdigest()
        for text in rows.notes_on(first.tally):
            note(text)

    def hash(self, position: StreamPosition | None = None) -> str:
        """Return the sha256 of all steps up to a position; without one, of the first block."""
        return self._hash if position is None else position.plan_hash

    def facts(self) -> PlanFacts:
        """Return the figures of the plan that are known before the run."""
        return PlanFacts(
            total_steps=self.total_steps,
            streamed=self._first_facts,
            steps=self.first_steps.facts(),
        )

    def notes(self, position: StreamPosition | None) -> list[str]:
        """Return a text on each outcome of the rows that were read up to a position."""
        # The notes on the first block were given when it was read.
        if position is None or position.tally.num_rows <= self._rows.buffer_size:
            return []
        return self._rows.notes_on(position.tally)

    def steps(
        self,
        after: int = 0,
        position: StreamPosition | None = None,
        *,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step]:
        """Yield the steps after a step.

        Args:
            after: the number of the step; 0 starts with the first step.
            position: the position of the step; needed unless after is 0.
            is_stopped: polled while data is read; True ends the steps.

        Raises:
            DataError: when a row cannot be used, or a whole pass has nothing to learn from.
            CheckpointError: when the rows up to the position have changed, or no position is given.
        """
        if position is None and after:
            raise damaged_position(f"there is none after step {after}")
        position = position or StreamPosition(plan_hash=self._hash)
        number = after
        while number < self.total_steps:
            rows: list[PlanRow] = []
            try:
                for row, end in self._reader.rows_of_pass(position, is_stopped):
                    rows.append(row)
                    if len(rows) < self._rows_per_step and end is None:
                        continue
                    number += 1
                    position = _position_after(number, rows, position, end)
                    yield _step(number, rows, position, ends_epoch=end is not None)
                    if number == self.total_steps:
                        return
                    rows = []
            except Stopped:
                return


def _position_after(
    number: int, rows: Sequence[PlanRow], before: StreamPosition, end: StreamPosition | None
) -> StreamPosition:
    """Return the position after a step.

    Args:
        number: the number of the step.
        rows: the rows of the step.
        before: the position before the step.
        end: the start of the next pass, where the step ends a pass.
    """
    digest = hashlib.sha256(before.plan_hash.encode())
    digest.update(documents_digest([d for row in rows for d in row.documents]).encode())
    digest.update(step_pairs(number, [i for row in rows for i in row.indices]))
    return dataclasses.replace(end or rows[-1].after, plan_hash=digest.hexdigest())


def _step(
    number: int, rows: Sequence[PlanRow], position: StreamPosition, *, ends_epoch: bool
) -> Step:
    return Step(
        number,
        float(position.epoch),
        ends_epoch,
        tuple(index for row in rows for index in row.indices),
        [document for row in rows for document in row.documents],
        position,
    )
