"""The steps of a run whose data is read as it goes: which documents form which step.

Rows come in blocks. A block's documents are put in an order that the seed, the epoch and the
block's number alone decide, so that the place in the stream is all that a checkpoint keeps, and
data that fits into one block gives the steps of Plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.data.documents.selection import NOTHING_LEFT
from phi3_lora.data.documents.store import document_lengths, num_loss_tokens
from phi3_lora.data.documents.stream import Block, Stopped, StreamedRows, StreamPass
from phi3_lora.data.documents.tally import Tally
from phi3_lora.engine.packing import Rows
from phi3_lora.errors import CheckpointError, DataError, listing
from phi3_lora.training.plan.facts import BlockFacts, PlanFacts
from phi3_lora.training.plan.packing import FirstSteps, shuffled_rows
from phi3_lora.training.plan.position import StreamPosition, damaged_position
from phi3_lora.training.plan.protocol import Step, step_pairs


class _Row(NamedTuple):
    """Documents that a step takes together."""

    indices: Sequence[int]
    documents: Sequence[Document]
    after: StreamPosition
    """Where the stream goes on after it; plan_hash is that of its step, and not yet there."""


class StreamedPlan:
    """The steps of a run, made as its data is read."""

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
            rows_per_step: documents a step; with row_tokens, rows of several.
            max_steps: optimizer steps.
            seed: of the order within each block.
            row_tokens: a row takes as many whole documents of a block as fit into so many tokens.
            note: told what the user should know of what is read.

        Raises:
            DataError: as StreamPass.read; when there is no row.
        """
        self.total_steps = max_steps
        self._rows = rows
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._row_tokens = row_tokens
        self._note = note
        self._told: set[str] = set()
        begun = StreamPass(rows)
        first = begun.read()
        if first is None:
            raise DataError(f"{rows} has no rows")
        # A pipe can be read but once: the first steps go on with this pass.
        self._begun: tuple[StreamPass, Block] | None = (begun, first)
        lengths = document_lengths(first.documents)
        self._first_facts = BlockFacts(
            buffer_size=rows.buffer_size,
            num_documents=len(first.documents),
            num_tokens=int(lengths.sum()),
            loss_tokens=num_loss_tokens(first.documents),
        )
        in_rows = self._in_rows(lengths, (0,))
        self.first_steps = FirstSteps(in_rows, lengths, rows_per_step, row_tokens)
        settings = [seed, rows_per_step, row_tokens, rows.buffer_size]
        held = f"{settings} {first.rows_hash} {documents_digest(first.documents)}"
        self._hash = hashlib.sha256(held.encode()).hexdigest()
        self._tell(begun)
        for text in rows.notes_on(first.tally):
            note(text)

    def hash(self, position: StreamPosition | None = None) -> str:
        """sha256 of what is known before the first step; of a position, of all steps up to it."""
        return self._hash if position is None else position.plan_hash

    def facts(self) -> PlanFacts:
        """Return the figures of the plan that are known before the run."""
        return PlanFacts(
            total_steps=self.total_steps,
            streamed=self._first_facts,
            steps=self.first_steps.facts(),
        )

    def notes(self, position: StreamPosition | None) -> list[str]:
        """Return a text on each outcome of rows read up to this position."""
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
        """The steps that follow the after-th one, whose position is needed unless it is 0.

        Raises:
            DataError: as StreamPass.read; when a whole pass has nothing to learn from.
            CheckpointError: when the rows up to the position are not those they were, or it is
                not the position of a stream.
        """
        if position is None and after:
            raise damaged_position(f"there is none after step {after}")
        place = position or StreamPosition(plan_hash=self._hash)
        number = after
        while number < self.total_steps:
            rows: list[_Row] = []
            try:
                for row, end in _with_end(self._pass(place, is_stopped)):
                    rows.append(row)
                    if len(rows) < self._rows_per_step and end is None:
                        continue
                    number += 1
                    step = self._step(number, rows, place, end)
                    assert step.position is not None
                    place = step.position
                    yield step
                    if number == self.total_steps:
                        return
                    rows = []
            except Stopped:
                return

    def _step(
        self, number: int, rows: list[_Row], before: StreamPosition, end: StreamPosition | None
    ) -> Step:
        indices = tuple(i for row in rows for i in row.indices)
        documents = [document for row in rows for document in row.documents]
        digest = hashlib.sha256(before.plan_hash.encode())
        digest.update(documents_digest(documents).encode())
        digest.update(step_pairs(number, indices))
        place = dataclasses.replace(end or rows[-1].after, plan_hash=digest.hexdigest())
        return Step(number, float(place.epoch), end is not None, indices, documents, place)

    def _pass(
        self, place: StreamPosition, is_stopped: Callable[[], bool]
    ) -> Iterator[_Row | StreamPosition]:
        """Rows from a place to the end of its pass, one at least, and where the next one begins."""
        num_documents = place.num_documents
        tally = place.tally
        is_empty, rows_hash = True, ""
        for block in self._blocks(place, is_stopped):
            is_resumed = block.number == place.block and bool(place.rows_hash)
            if is_resumed and block.rows_hash != place.rows_hash:
                raise self._other_rows()
            if place.epoch == 0 and not is_resumed:
                tally += block.tally
            at = StreamPosition(
                epoch=place.epoch,
                block=block.number,
                num_documents=num_documents,
                rows_hash=block.rows_hash,
                plan_hash="",
                first_pass_hash=place.first_pass_hash,
                tally=tally,
            )
            for row in self._rows_of(block, at, skip=place.row if is_resumed else 0):
                yield row
                is_empty = False
            num_documents += len(block.documents)
            rows_hash = block.rows_hash
        if is_empty and place.rows_hash:
            raise self._other_rows()
        if is_empty:
            raise self._nothing_left(place, tally)
        if place.first_pass_hash not in ("", rows_hash):
            self._note(
                f"{self._rows} changed since the first pass: pass {place.epoch + 1:,} read other "
                "rows, so that the run cannot be repeated"
            )
        # Blocks without documents may have come after the last row.
        yield StreamPosition(
            epoch=place.epoch + 1,
            plan_hash="",
            first_pass_hash=place.first_pass_hash or rows_hash,
            tally=tally,
        )

    def _rows_of(self, block: Block, at: StreamPosition, *, skip: int) -> Iterator[_Row]:
        part = (at.epoch, block.number) if block.number else (at.epoch,)
        rows = self._in_rows(document_lengths(block.documents), part)
        if skip > rows.num_rows:
            raise self._other_rows()
        for i in range(skip, rows.num_rows):
            chosen = rows.documents[rows.starts[i] : rows.starts[i + 1]].tolist()
            yield _Row(
                [at.num_documents + j for j in chosen],
                [block.documents[j] for j in chosen],
                dataclasses.replace(at, row=i + 1),
            )

    def _in_rows(self, lengths: NDArray[np.int64], part: tuple[int, ...]) -> Rows:
        return shuffled_rows(lengths, seed=self._seed, part=part, row_tokens=self._row_tokens)

    def _blocks(self, place: StreamPosition, is_stopped: Callable[[], bool]) -> Iterator[Block]:
        """Blocks from that of a place on."""
        block: Block | None = None
        if self._begun is None:
            reading = StreamPass(self._rows)
        else:
            # Held here alone, so that the block is gone when the next one is done with.
            reading, block = self._begun
            self._begun = None
        reading.is_stopped = is_stopped
        if place.block:
            num_rows = place.block * self._rows.buffer_size
            self._note(f"reading past {num_rows:,} rows, up to where the run was")
            block = None
        while reading.number < place.block:
            if not reading.skip():
                raise self._other_rows()
        block = block or reading.read()
        if block is None and place.rows_hash:
            raise self._other_rows()
        while block is not None:
            self._tell(reading)
            yield block
            block = reading.read()
        self._tell(reading)

    def _tell(self, reading: StreamPass) -> None:
        """Notes on the formats of what was read, each once a run."""
        for text in reading.notes():
            if text not in self._told:
                self._told.add(text)
                self._note(text)

    def _nothing_left(self, place: StreamPosition, tally: Tally) -> DataError:
        if place.epoch:
            return DataError(
                f"{self._rows}: no row is left to learn from when read again, after "
                f"{place.epoch:,} whole pass(es); a pipe can be read but once: write its rows to a "
                "file, or ask for fewer steps (--max-steps)"
            )
        problem = f"{self._rows}: {NOTHING_LEFT}"
        return DataError(listing(problem, self._rows.notes_on(tally)))

    def _other_rows(self) -> CheckpointError:
        return CheckpointError(
            f"cannot resume: the rows of {self._rows} are not those that the run began with; to "
            "train on with other data, start a new run with --adapter"
        )


def _with_end(
    items: Iterator[_Row | StreamPosition],
) -> Iterator[tuple[_Row, StreamPosition | None]]:
    """Each row of a pass; the last one with the place that follows the rows."""
    held: _Row | None = None
    try:
        for item in items:
            if held is not None:
                yield held, item if isinstance(item, StreamPosition) else None
            held = item if isinstance(item, _Row) else None
    except DataError:
        # Rows that cannot be used take nothing from the steps before them.
        if held is not None:
            yield held, None
        raise
