"""The rows of a streamed plan, read block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.selection import NOTHING_LEFT
from phi3_lora.data.documents.store import document_lengths
from phi3_lora.data.documents.stream import Block, StreamedRows, StreamPass
from phi3_lora.data.documents.tally import Tally
from phi3_lora.engine.packing import Rows
from phi3_lora.errors import CheckpointError, DataError, listing
from phi3_lora.training.plan.packing import shuffled_rows
from phi3_lora.training.plan.position import StreamPosition


class PlanRow(NamedTuple):
    """Documents that a step takes together."""

    indices: Sequence[int]
    """Numbers of the documents in their pass."""
    documents: Sequence[Document]
    after: StreamPosition
    """The position after the row; its plan_hash is empty, because the step sets it."""


class RowReader:
    """Reader of the rows of a streamed plan."""

    def __init__(
        self,
        rows: StreamedRows,
        *,
        seed: int,
        row_tokens: int | None,
        note: Callable[[str], None],
    ) -> None:
        """Read the first block.

        Args:
            rows: the training data.
            seed: seed of the order within each block.
            row_tokens: tokens that a row may have. A row takes as many whole documents of a block
                as fit; with None it takes one document.
            note: receives texts that the user should see.

        Raises:
            DataError: when there is no row, or a row cannot be used.
        """
        self._rows = rows
        self._seed = seed
        self._row_tokens = row_tokens
        self._note = note
        self._noted: set[str] = set()
        first_pass = StreamPass(rows)
        block = first_pass.read()
        if block is None:
            raise DataError(f"{rows} has no rows")
        # A pipe can be read only once, so the first steps continue this pass.
        self._begun: tuple[StreamPass, Block] | None = (first_pass, block)
        self._pass_on_notes(first_pass)

    def first_block(self) -> Block:
        """Return the first block; call this before rows_of_pass, which frees it."""
        assert self._begun is not None
        return self._begun[1]

    def in_rows(self, lengths: NDArray[np.int64], part: tuple[int, ...]) -> Rows:
        """Put the documents of a block in rows.

        Args:
            lengths: (D,) tokens of each document.
            part: numbers of the pass and the block.
        """
        return shuffled_rows(lengths, seed=self._seed, part=part, row_tokens=self._row_tokens)

    def rows_of_pass(
        self, start: StreamPosition, is_stopped: Callable[[], bool]
    ) -> Iterator[tuple[PlanRow, StreamPosition | None]]:
        """Yield the rows from a position to the end of its pass, at least one.

        Args:
            start: the position.
            is_stopped: polled while data is read; True raises Stopped.

        Yields:
            Each row with None; the last row with the position at which the next pass begins.

        Raises:
            DataError: when a row cannot be used, or a whole pass has nothing to learn from.
            CheckpointError: when the rows up to the position have changed.
        """
        held: PlanRow | None = None
        try:
            for item in self._rows_and_end(start, is_stopped):
                if held is not None:
                    yield held, item if isinstance(item, StreamPosition) else None
                held = item if isinstance(item, PlanRow) else None
        except DataError:
            # The steps before a row that cannot be used are taken first.
            if held is not None:
                yield held, None
            raise

    def _rows_and_end(
        self, start: StreamPosition, is_stopped: Callable[[], bool]
    ) -> Iterator[PlanRow | StreamPosition]:
        """Yield the rows from a position to the end of its pass, then the next pass's start."""
        num_documents = start.num_documents
        tally = start.tally
        is_empty, rows_hash = True, ""
        for block in self._blocks(start, is_stopped):
            is_resumed = block.number == start.block and bool(start.rows_hash)
            if is_resumed and block.rows_hash != start.rows_hash:
                raise self._other_rows()
            if start.epoch == 0 and not is_resumed:
                tally += block.tally
            at = StreamPosition(
                epoch=start.epoch,
                block=block.number,
                num_documents=num_documents,
                rows_hash=block.rows_hash,
                plan_hash="",
                first_pass_hash=start.first_pass_hash,
                tally=tally,
            )
            for row in self._rows_of_block(block, at, skip=start.row if is_resumed else 0):
                yield row
                is_empty = False
            num_documents += len(block.documents)
            rows_hash = block.rows_hash
        if is_empty and start.rows_hash:
            raise self._other_rows()
        if is_empty:
            raise self._nothing_left(start, tally)
        if start.first_pass_hash not in ("", rows_hash):
            self._note(
                f"{self._rows} changed since the first pass: pass {start.epoch + 1:,} read other "
                "rows, so that the run cannot be repeated"
            )
        # The tally also counts blocks without documents after the last row.
        yield StreamPosition(
            epoch=start.epoch + 1,
            plan_hash="",
            first_pass_hash=start.first_pass_hash or rows_hash,
            tally=tally,
        )

    def _rows_of_block(self, block: Block, at: StreamPosition, *, skip: int) -> Iterator[PlanRow]:
        part = (at.epoch, block.number) if block.number else (at.epoch,)
        rows = self.in_rows(document_lengths(block.documents), part)
        if skip > rows.num_rows:
            raise self._other_rows()
        for i in range(skip, rows.num_rows):
            chosen = rows.documents[rows.starts[i] : rows.starts[i + 1]].tolist()
            yield PlanRow(
                [at.num_documents + j for j in chosen],
                [block.documents[j] for j in chosen],
                dataclasses.replace(at, row=i + 1),
            )

    def _blocks(self, start: StreamPosition, is_stopped: Callable[[], bool]) -> Iterator[Block]:
        """Yield the blocks of a pass, from the block of a position on."""
        block: Block | None = None
        if self._begun is None:
            reading = StreamPass(self._rows)
        else:
            # Only this variable holds the block, so that its memory is freed after its use.
            reading, block = self._begun
            self._begun = None
        reading.is_stopped = is_stopped
        if start.block:
            num_rows = start.block * self._rows.buffer_size
            self._note(f"reading past {num_rows:,} rows, up to where the run was")
            block = None
        while reading.number < start.block:
            if not reading.skip():
                raise self._other_rows()
        block = block or reading.read()
        if block is None and start.rows_hash:
            raise self._other_rows()
        while block is not None:
            self._pass_on_notes(reading)
            yield block
            block = reading.read()
        self._pass_on_notes(reading)

    def _pass_on_notes(self, reading: StreamPass) -> None:
        """Pass on the notes on the formats of the rows, each note once a run."""
        for text in reading.notes():
            if text not in self._noted:
                self._noted.add(text)
                self._note(text)

    def _nothing_left(self, start: StreamPosition, tally: Tally) -> DataError:
        if start.epoch:
            return DataError(
                f"{self._rows}: no row is left to learn from when read again, after "
                f"{start.epoch:,} whole pass(es); a pipe can be read but once: write its rows to a "
                "file, or ask for fewer steps (--max-steps)"
            )
        problem = f"{self._rows}: {NOTHING_LEFT}"
        return DataError(listing(problem, self._rows.notes_on(tally)))

    def _other_rows(self) -> CheckpointError:
        return CheckpointError(
            f"cannot resume: the rows of {self._rows} are not those that the run began with; to "
            "train on with other data, start a new run with --adapter"
        )
