"""The steps of a run, as every plan gives them."""

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
    """Numbers of its documents: places in the data set; of a stream, in the order they came."""
    documents: Sequence[Document] = field(compare=False, repr=False)
    position: StreamPosition | None = None
    """Where the plan goes on after it, for plans that need to know."""


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
        """The steps that follow the after-th one.

        Args:
            after: a step's number.
            position: what that step has as its position.
            is_stopped: asked while data is read, which may take long; true ends the steps.

        Raises:
            DataError: when data that is read on the way cannot be used.
            CheckpointError: when the data is not what it was at that position.
        """

    def hash(self, position: StreamPosition | None = None) -> str:
        """sha256 that tells this plan from others; of a position, of the steps up to it."""

    def facts(self) -> PlanFacts:
        """Return the figures of the plan that are known before the run."""

    @property
    def first_steps(self) -> FirstSteps:
        """Those of the first epoch; of a stream, of what is read at first."""

    def notes(self, position: StreamPosition | None) -> list[str]:
        """What is to be said, after the step of this position, of rows read on the way."""


def step_pairs(number: int, indices: Sequence[int]) -> bytes:
    """The (step, document) pairs of a step, as they are hashed."""
    return "".join([f"{number} {index};" for index in indices]).encode()
