"""The interface of a plan, which gives the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.training.plan.facts import PlanFacts
from phi3_lora.training.plan.packing import FirstSteps
from phi3_lora.training.plan.position import StreamPosition


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step."""

    number: int
    """From 1."""
    epoch: float
    """Epochs finished after this step."""
    ends_epoch: bool
    indices: tuple[int, ...]
    """Numbers of the documents: their places in the data set; for a stream, in the pass."""
    documents: Sequence[Document] = field(compare=False, repr=False)
    position: StreamPosition | None = None
    """The position in the data after the step; None where all data is read before the run."""


class StepPlan(Protocol):
    """The steps of a run."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps."""

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
            position: the position of the step.
            is_stopped: polled while data is read, which may take long; True ends the steps.

        Raises:
            DataError: when streamed data cannot be used.
            CheckpointError: when the streamed data up to the position has changed.
        """

    def hash(self, position: StreamPosition | None = None) -> str:
        """Return the sha256 of the plan; with a position, of the steps up to it."""

    def facts(self) -> PlanFacts:
        """Return the figures of the plan that are known before the run."""

    @property
    def first_steps(self) -> FirstSteps:
        """The steps of the first epoch; for a stream, of the first block."""

    def notes(self, position: StreamPosition | None) -> list[str]:
        """Return notes for the user on the rows that were read up to a position."""


def step_pairs(number: int, indices: Sequence[int]) -> bytes:
    """Return the (step, document) pairs of a step as bytes to hash."""
    return "".join([f"{number} {index};" for index in indices]).encode()
