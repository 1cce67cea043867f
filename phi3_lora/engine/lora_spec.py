"""Specification of the LoRA layers and trained weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


def lora_scaling(lora_alpha: float, r: int, *, use_rslora: bool) -> float:
    """Return the factor that multiplies B A.

    Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732.
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_alpha_of(scaling: float, r: int, *, use_rslora: bool) -> float:
    """Return the lora_alpha that gives this scaling (the inverse of lora_scaling)."""
    return scaling * (math.sqrt(r) if use_rslora else r)


class Block(NamedTuple):
    """The block that one part's B fills in the B of a fused projection."""

    part: str
    """Full path of the part, for example model.layers.0.self_attn.q_proj."""
    rows: tuple[int, int]
    """First and end row."""
    ranks: tuple[int, int]
    """First and end column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraLayer:
    """LoRA on one linear layer or embedding."""

    r: int
    """Rank of A (R, in) and B (out, R)."""
    lora_alpha: float
    num_trained: int | None = None
    """Number of ranks that train, from the first; the others keep their first values. None: all."""
    blocks: tuple[Block, ...] = ()
    """Blocks of B that train; B is 0 outside them. Empty: the whole B trains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """The LoRA layers and trained weights of a model, by full module path."""

    layers: Mapping[str, LoraLayer]
    """LoRA layers by full module path, for example model.layers.0.self_attn.qkv_proj."""
    use_rslora: bool = False
    use_dora: bool = False
    """Each linear layer also trains a magnitude (out,): the row norms of W + scaling B A."""
    dropout: float = 0.0
    """Probability that an input feature of a LoRA layer is zeroed in training."""
    saved: tuple[str, ...] = ()
    """Full paths of the modules whose whole weight trains (modules_to_save)."""

    @classmethod
    def uniform(
        cls, modules: Iterable[str], *, r: int, scaling: float, dropout: float = 0.0
    ) -> LoraSpec:
        """Make a spec with one rank and one scaling for all modules."""
        layer = LoraLayer(r=r, lora_alpha=scaling * r)
        return cls(layers=dict.fromkeys(modules, layer), dropout=dropout)

    @property
    def modules(self) -> tuple[str, ...]:
        """Full paths of the LoRA layers."""
        return tuple(self.layers)

    def scaling(self, module: str) -> float:
        """Return the factor that multiplies B A in a module."""
        layer = self.layers[module]
        return lora_scaling(layer.lora_alpha, layer.r, use_rslora=self.use_rslora)
