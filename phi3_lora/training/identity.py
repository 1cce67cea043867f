"""The identity of a run: a checkpoint belongs to a run only if their identities are equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """The base model, the data and the shape of the adapter, each as a text to compare."""

    model_identity: str
    """sha256 of the base model's config and weights."""
    plan_hash: str
    """sha256 of the steps; for streamed data, of the first block."""
    valid_hash: str
    """sha256 of the validation documents."""
    lora: str
    """Shape of the adapter, in words and as a CRC."""

    def to_dict(self) -> dict[str, str]:
        """Return the texts by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunIdentity:
        """Read the output of to_dict; other keys are ignored, a missing text becomes unknown."""
        return cls(**{name: values.get(name, "unknown") for name in cls.__dataclass_fields__})
