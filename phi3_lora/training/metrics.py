"""The records of metrics.jsonl, and the sums that they are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from phi3_lora.inference.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetrics:
    """Metrics of the steps since the previous record."""

    step: int
    """The latest optimizer step."""
    epoch: float
    """Epochs finished."""
    loss: float
    """Nats per supervised token: the token-weighted mean."""
    grad_norm: float
    """L2 norm of the latest step's gradients, before clipping."""
    lr: float
    """Learning rate of the latest step."""
    loss_tokens: int
    """Supervised tokens."""
    tokens: int
    step_seconds: float
    """Mean duration of a step."""
    tokens_per_second: float
    peak_memory_bytes: int
    plan_hash: str | None = None
    """sha256 of all steps so far, where data is streamed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics by name, without a plan_hash that is None."""
        values = asdict(self)
        if self.plan_hash is None:
            del values["plan_hash"]
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalMetrics:
    """Metrics of an evaluation on the validation data."""

    step: int
    """The optimizer step after which the evaluation ran."""
    eval_loss: float
    """Nats per supervised token."""
    eval_perplexity: float
    eval_token_accuracy: float
    """Share of supervised tokens whose target has the largest logit."""
    eval_loss_tokens: int
    """Supervised tokens."""

    @classmethod
    def of(cls, evaluation: Evaluation, step: int) -> EvalMetrics:
        """Take the metrics of an evaluation after a step."""
        return cls(
            step=step,
            eval_loss=evaluation.loss,
            eval_perplexity=evaluation.perplexity,
            eval_token_accuracy=evaluation.token_accuracy,
            eval_loss_tokens=evaluation.loss_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics by name."""
        return asdict(self)


@dataclass(slots=True)
class Window:
    """Sums since the latest record; checkpoints keep them, so that a resumed run logs equally."""

    nats: float = 0.0
    """Sum of the negative log-probabilities of supervised tokens."""
    loss_tokens: int = 0
    """Supervised tokens."""
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0

    def add(self, *, nats: float, loss_tokens: int, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.nats += nats
        self.loss_tokens += loss_tokens
        self.tokens += tokens
        self.seconds += seconds
        self.steps += 1

    @property
    def loss(self) -> float:
        """Token-weighted mean loss, in nats per supervised token."""
        return self.nats / self.loss_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the sums by name."""
        return asdict(self)
