"""The progress of a run: the part of its state that is not tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phi3_lora.training.metrics import Window
from phi3_lora.training.plan.position import StreamPosition


@dataclass(slots=True)
class Progress:
    """The progress of a run after its latest step."""

    step: int = 0
    """The latest optimizer step; 0 before the first one."""
    window: Window = field(default_factory=Window)
    """Sums since the latest line of metrics."""
    best_eval_loss: float | None = None
    """Nats per supervised token."""
    last_loss: float | None = None
    """Training loss of the latest line of metrics, in nats per supervised token."""
    tokens: int = 0
    """Tokens trained on, including those without loss."""
    seconds: float = 0.0
    """Time spent in optimizer steps."""
    position: StreamPosition | None = None
    """Place in streamed data; None where all data is read before the run."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, exact in JSON."""
        return {
            "step": self.step,
            "window": self.window.to_dict(),
            "best_eval_loss": self.best_eval_loss,
            "last_loss": self.last_loss,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "position": None if self.position is None else self.position.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """Read the output of to_dict; other keys are ignored.

        Raises:
            CheckpointError: when the position in the data is damaged.
        """
        names = ("step", "best_eval_loss", "last_loss", "tokens", "seconds")
        known = {name: values[name] for name in names}
        position = values.get("position")
        return cls(
            window=Window(**values["window"]),
            position=None if position is None else StreamPosition.from_dict(position),
            **known,
        )
