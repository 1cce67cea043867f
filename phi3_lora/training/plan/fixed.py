"""The plan of a run whose data is read before training: the documents of each optimizer step.

The plan is a pure function of the data, the seed and the configuration. It does not depend on the
backend or the number of ranks. Its hash is logged.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.data.documents.store import document_lengths, num_loss_tokens
from phi3_lora.engine.packing import Rows
from phi3_lora.training.plan.facts import PlanFacts
from phi3_lora.training.plan.packing import FirstSteps, shuffled_rows
from phi3_lora.training.plan.position import StreamPosition
from phi3_lora.training.plan.protocol import Step, step_pairs


class Plan:
    """The steps of a run, computed epoch by epoch."""

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        rows_per_step: int,
        num_epochs: float,
        max_steps: int,
        seed: int,
        row_tokens: int | None = None,
    ) -> None:
        """Compute the number of steps.

        Args:
            documents: the training documents.
            rows_per_step: documents of a step; with row_tokens, rows of several documents.
            num_epochs: passes over the data; used when max_steps is not positive.
            max_steps: optimizer steps; a positive number wins over num_epochs.
            seed: seed of the order within each epoch.
            row_tokens: tokens that a row may have. A row takes as many whole documents as fit;
                with None it takes one document.
        """
        self._documents = documents
        self._lengths = document_lengths(documents)
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._row_tokens = row_tokens
        self._cached = (-1, Rows(np.arange(0), np.arange(1)))
        self.steps_per_epoch = math.ceil(self._epoch(0).num_rows / rows_per_step)
        self.total_steps = (
            max_steps if max_steps > 0 else math.ceil(num_epochs * self.steps_per_epoch)
        )

    def steps(
        self,
        after: int = 0,
        position: StreamPosition | None = None,
        *,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step]:
        """Yield the steps after step `after`; position and is_stopped have no effect."""
        for number in range(after + 1, self.total_steps + 1):
            yield self.step(number)

    def step(self, number: int) -> Step:
        """Return the step with a number; the first step is 1."""
        epoch, within = divmod(number - 1, self.steps_per_epoch)
        indices = self._indices(number)
        return Step(
            number,
            epoch + (within + 1) / self.steps_per_epoch,
            within + 1 == self.steps_per_epoch,
            indices,
            [self._documents[i] for i in indices],
        )

    def _indices(self, number: int) -> tuple[int, ...]:
        # Packing depends on lengths alone, so every epoch has the same number of steps.
        epoch, within = divmod(number - 1, self.steps_per_epoch)
        rows = self._epoch(epoch)
        first = within * self._rows_per_step
        # The last, shorter step is kept.
        last = min(first + self._rows_per_step, rows.num_rows)
        return tuple(rows.documents[rows.starts[first] : rows.starts[last]].tolist())

    def _epoch(self, epoch: int) -> Rows:
        if self._cached[0] != epoch:
            rows = shuffled_rows(
                self._lengths, seed=self._seed, part=(epoch,), row_tokens=self._row_tokens
            )
            self._cached = (epoch, rows)
        return self._cached[1]

    def hash(self, position: StreamPosition | None = None) -> str:
        """Return the sha256 over every (step, document) pair and the documents' ids and masks."""
        digest = hashlib.sha256(documents_digest(self._documents).encode())
        for number in range(1, self.total_steps + 1):
            digest.update(step_pairs(number, self._indices(number)))
        return digest.hexdigest()

    def facts(self) -> PlanFacts:
        """Return the figures of the plan."""
        return PlanFacts(
            num_documents=len(self._documents),
            num_tokens=int(self._lengths.sum()),
            loss_tokens=num_loss_tokens(self._documents),
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            steps=self.first_steps.facts(),
        )

    @property
    def first_steps(self) -> FirstSteps:
        """The steps of the first epoch."""
        return FirstSteps(self._epoch(0), self._lengths, self._rows_per_step, self._row_tokens)

    def notes(self, position: StreamPosition | None) -> list[str]:
        """Return no notes; they were given when the data was read."""
        return []
