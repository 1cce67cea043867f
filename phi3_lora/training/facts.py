"""The facts of a run that are known before its first step."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from phi3_lora.models.config import Quantization
from phi3_lora.training.environment import Environment
from phi3_lora.training.identity import RunIdentity
from phi3_lora.training.plan.facts import PlanFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """The figures of a run that are known without the weights; `train --dry-run` prints them."""

    model: str
    """The base model: a folder, a hub id, or demo."""
    quantize: Quantization
    family: str | None
    """Hub id of the released model with this shape, if there is one."""
    num_parameters: int
    """Parameters of the base model."""
    num_trainable_parameters: int
    """Parameters of the adapter."""
    num_modules: int
    """Modules that train, with LoRA or as whole weights."""
    num_eval_documents: int
    documents_per_step: int
    """Documents (with packing: rows) of an optimizer step."""
    plan: PlanFacts
    plan_hash: str
    """sha256 of the plan; for streamed data, of the first block."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name; the figures of the plan are on the same level."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plan_hash = values.pop("plan_hash")
        del values["plan"]
        return {**values, **self.plan.to_dict(), "plan_hash": plan_hash}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """The start of a run, or the point from which it resumes."""

    facts: RunFacts
    environment: Environment
    identity: RunIdentity
    padding: float
    """Share of the computed tokens that are padding."""
    step: int
    """The latest step already taken; 0 for a new run."""
    is_resumed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the record of the start or the resume in metrics.jsonl."""
        return {
            "event": "resume" if self.is_resumed else "start",
            **self.environment.to_dict(),
            "model_identity": self.identity.model_identity,
            **self.facts.to_dict(),
            "padding": self.padding,
            "step": self.step,
        }
