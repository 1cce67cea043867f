"""The position in streamed data; checkpoints keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from phi3_lora.data.documents.tally import Tally
from phi3_lora.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPosition:
    """The position in streamed data after a step."""

    epoch: int = 0
    """Passes that have ended."""
    block: int = 0
    """Number of the block in its pass, from 0."""
    row: int = 0
    """Rows of the plan that were taken from the block so far."""
    num_documents: int = 0
    """Documents of the pass before the block."""
    rows_hash: str = ""
    """sha256 of the pass up to the end of the block; empty before its first step."""
    plan_hash: str
    """sha256 of all steps so far."""
    first_pass_hash: str = ""
    """sha256 of all rows of the first pass; empty until it has ended."""
    tally: Tally = field(default_factory=Tally)
    """Outcomes of the rows of the first pass, up to the end of the block."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "tally": self.tally.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamPosition:
        """Read the output of to_dict.

        Raises:
            CheckpointError: when the values are not a position in a stream.
        """
        try:
            position = cls(**{**values, "tally": Tally.from_dict(values.get("tally", {}))})
        except (TypeError, ValueError, AttributeError) as cause:
            raise damaged_position(cause) from None
        numbers = (position.epoch, position.block, position.row, position.num_documents)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise damaged_position(f"numbers must be whole and not negative, got {numbers}")
        hashes = (position.rows_hash, position.plan_hash, position.first_pass_hash)
        if not all(isinstance(text, str) for text in hashes):
            raise damaged_position("its hashes must be texts")
        return position


def damaged_position(why: object) -> CheckpointError:
    """Return the error for a position that cannot be used."""
    return CheckpointError(
        f"cannot resume: the checkpoint's position in the data is damaged: {why}; delete the "
        "checkpoint, and the one before it is used"
    )
