"""The figures of a plan that are known before the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTokens:
    """Tokens of a step."""

    least: int
    mean: int
    """Rounded."""
    most: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """The figures of the first steps."""

    step_tokens: StepTokens | None
    """None where the first rows give no document."""
    row_fill: float | None
    """Share of a packed row that tokens fill; None without packing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFacts:
    """The figures of the first block of a stream."""

    buffer_size: int
    """Rows of a block."""
    num_documents: int
    num_tokens: int
    loss_tokens: int
    """Supervised tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFacts:
    """The figures of a plan; for streamed data those of the whole data set are None."""

    num_documents: int | None = None
    num_tokens: int | None = None
    loss_tokens: int | None = None
    """Supervised tokens."""
    steps_per_epoch: int | None = None
    total_steps: int
    streamed: BlockFacts | None = None
    """None where all data is read before the run."""
    steps: StepFacts

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, without `streamed` where it is None."""
        values = asdict(self)
        values |= values.pop("steps")
        if self.streamed is None:
            del values["streamed"]
        return values
