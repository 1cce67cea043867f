"""Values that an adapter file does not store and that its user has to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MissingMetadata:
    """Values that loralib and .npz files do not store."""

    alpha: float | None = None
    """lora_alpha; loralib's own default is 1."""
    prefix: str = ""
    """Text before the module paths of Phi-3."""
    enable: Sequence[str] = ()
    """Parts of a fused projection that MergedLinear adapts, such as q, v."""
    parts: str | None = None
    """equal: parts of one size, as in loralib; model: parts of the model's sizes."""
