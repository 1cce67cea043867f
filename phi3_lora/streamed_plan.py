"""The steps of a run whose data is read as it goes: which documents form which step.

Rows come in blocks. A block's documents are put in an order that the seed, the epoch and the
block's number alone decide, so that the place in the stream is all that a checkpoint keeps, and
data that fits into one block gives the steps of Plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from phi3_lora.data.dataset import documents_digest
from phi3_lora.data.store import document_lengths, num_loss_tokens
from phi3_lora.data.stream import Block, Pass, StreamedRows
from phi3_lora.data.tally import Tally
from phi3_lora.data.tokenizer import Document
from phi3_lora.errors import CheckpointError, DataError, listing
from phi3_lora.packing import FirstSteps, Rows, shuffled_rows
from phi3_lora.plan import Position, Step, step_pairs

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a stream goes on."""

    epoch: int = 0
    """Passes that have ended."""
    block: int = 0
    row: int = 0
    """Rows of the plan that were taken of the block."""
    num_documents: int = 0
    """Of the pass, before the block."""
    rows_hash: str = ""
    """Of the pass, up to the end of the block; empty before its first step."""
    plan_hash: str
    """Of all steps so far."""
    tally: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What became of the rows of the first pass, up to the end of the block."""

    @property
    def tallied(self) -> Tally:
        """What became of the rows of the first pass."""
        return Tally(**self.tally)


class _Row(NamedTuple):
    """Documents that a step takes together."""

    indices: Sequence[int]
    documents: Sequence[Document]
    after: Place
    """Where the stream goes on after it; plan_hash is not yet that of its step."""


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
            DataError: as Pass.read; when there is no row.
        """
        self.total_steps = max_steps
        self._rows = rows
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._row_tokens = row_tokens
        self._note = note
        begun = Pass(rows)
        first = begun.read()
        if first is None:
            raise DataError(f"{rows} has no rows")
        # A pipe can be read but once: the first steps go on with this pass.
        self._begun: tuple[Pass, Block] | None = (begun, first)
        lengths = document_lengths(first.documents)
        self._first_facts = {
            "buffer_size": rows.buffer_size,
            "num_documents": len(first.documents),
            "num_tokens": int(lengths.sum()),
            "loss_tokens": num_loss_tokens(first.documents),
        }
        in_rows = self._in_rows(lengths, (0,))
        self.first_steps = FirstSteps(in_rows, lengths, rows_per_step, row_tokens)
        settings = [seed, rows_per_step, row_tokens, rows.buffer_size]
        held = f"{settings} {first.rows_hash} {documents_digest(first.documents)}"
        self._hash = hashlib.sha256(held.encode()).hexdigest()
        for text in [*first.notes, *rows.told(first.tally)]:
            note(text)

    def hash(self, position: Position | None = None) -> str:
        """sha256 of what is known before the first step; of a position, of all steps up to it."""
        return self._hash if position is None else Place(**position).plan_hash

    def facts(self) -> dict[str, Any]:
        """Figures by name; None where they are not known before the run."""
        unknown = dict.fromkeys(("num_documents", "num_tokens", "loss_tokens", "steps_per_epoch"))
        return {
            **unknown,
            "total_steps": self.total_steps,
            "streamed": self._first_facts,
            **self.first_steps.facts(),
        }

    def notes(self, position: Position | None) -> list[str]:
        """What became of the rows that were read."""
        place = None if position is None else Place(**position)
        # Of one block, all was said when it was read.
        is_more = place is not None and place.tallied.num_rows > self._rows.buffer_size
        return self._rows.told(place.tallied) if place and is_more else []

    def steps(self, after: int = 0, position: Position | None = None) -> Iterator[Step]:
        """The steps that follow the after-th one, whose position is needed unless it is 0.

        Raises:
            DataError: as Pass.read; when a whole pass has nothing to learn from.
            CheckpointError: when the rows up to the position are not those they were.
        """
        place = Place(plan_hash=self._hash) if position is None else Place(**position)
        number = after + 1
        while True:
            rows: list[_Row] = []
            for row, is_last in _with_last(self._pass(place)):
                rows.append(row)
                if len(rows) < self._rows_per_step and not is_last:
                    continue
                step = self._step(number, rows, place, ends_epoch=is_last)
                assert step.position is not None
                place = Place(**step.position)
                yield step
                if number == self.total_steps:
                    return
                number, rows = number + 1, []

    def _step(self, number: int, rows: list[_Row], before: Place, *, ends_epoch: bool) -> Step:
        indices = tuple(i for row in rows for i in row.indices)
        documents = [document for row in rows for document in row.documents]
        digest = hashlib.sha256(before.plan_hash.encode())
        digest.update(documents_digest(documents).encode())
        digest.update(step_pairs(number, indices))
        place = dataclasses.replace(rows[-1].after, plan_hash=digest.hexdigest())
        if ends_epoch:
            place = Place(epoch=place.epoch + 1, plan_hash=place.plan_hash, tally=place.tally)
        return Step(
            number, float(place.epoch), ends_epoch, indices, documents, dataclasses.asdict(place)
        )

    def _pass(self, place: Place) -> Iterator[_Row]:
        """Rows from a place to the end of its pass; one at least, or an error."""
        num_documents = place.num_documents
        tally = place.tallied
        is_empty = True
        for block in self._blocks(place):
            is_resumed = block.number == place.block and bool(place.rows_hash)
            if is_resumed and block.rows_hash != place.rows_hash:
                raise self._other_rows()
            if place.epoch == 0 and not is_resumed:
                tally += block.tally
            at = Place(
                epoch=place.epoch,
                block=block.number,
                num_documents=num_documents,
                rows_hash=block.rows_hash,
                plan_hash=place.plan_hash,
                tally=dataclasses.asdict(tally),
            )
            for row in self._rows_of(block, at, skip=place.row if is_resumed else 0):
                yield row
                is_empty = False
            num_documents += len(block.documents)
        if is_empty and place.rows_hash:
            raise self._other_rows()
        if is_empty:
            problem = f"{self._rows}: no row is left to learn from"
            raise DataError(listing(problem, self._rows.told(tally)))

    def _rows_of(self, block: Block, at: Place, *, skip: int) -> Iterator[_Row]:
        part = (at.epoch, block.number) if block.number else (at.epoch,)
        rows = self._in_rows(document_lengths(block.documents), part)
        for i in range(skip, rows.num_rows):
            chosen = rows.documents[rows.starts[i] : rows.starts[i + 1]].tolist()
            yield _Row(
                [at.num_documents + j for j in chosen],
                [block.documents[j] for j in chosen],
                dataclasses.replace(at, row=i + 1),
            )

    def _in_rows(self, lengths: NDArray[np.int64], part: tuple[int, ...]) -> Rows:
        return shuffled_rows(lengths, seed=self._seed, part=part, row_tokens=self._row_tokens)

    def _blocks(self, place: Place) -> Iterator[Block]:
        """Blocks from that of a place on."""
        begun, self._begun = self._begun, None
        reading, block = begun if begun is not None else (Pass(self._rows), None)
        if place.block:
            num_rows = place.block * self._rows.buffer_size
            self._note(f"reading past {num_rows:,} rows, up to where the run was")
            while reading.number < place.block:
                if not reading.skip():
                    raise self._other_rows()
            block = None
        block = block or reading.read()
        if block is None and place.rows_hash:
            raise self._other_rows()
        while block is not None:
            yield block
            block = reading.read()
            for text in block.notes if block else ():
                self._note(text)

    def _other_rows(self) -> CheckpointError:
        return CheckpointError(
            f"cannot resume: the rows of {self._rows} are not those that the run began with; to "
            "train on with other data, start a new run with --adapter"
        )


def _with_last(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one."""
    held = list(itertools.islice(items, 1))
    for item in items:
        yield held[0], False
        held = [item]
    for item in held:
        yield item, True
