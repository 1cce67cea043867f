"""An adapter in memory, and functions that build one."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from phi3_lora.adapters.factorization import balanced_factors, product_norm
from phi3_lora.adapters.names import (
    PEFT_PREFIX,
    lora_a_name,
    lora_b_name,
    saved_name,
    split_name,
)
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.engine.lora_spec import LoraLayer, LoraSpec, lora_scaling


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """LoRA weights under PEFT names, with their ranks and scales.

    Every conversion reads into this form and writes from it. The tensors give each module's rank.
    """

    weights: Tensors
    r: int
    """The rank of most modules."""
    lora_alpha: float
    use_rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    """lora_alpha of the modules where it differs from the field lora_alpha."""
    lora_dropout: float = 0.0
    base_model: str | None = None
    """The base model that the adapter names."""
    base_identity: str | None = None
    """Identity of the base model; None if the adapter has no fingerprint."""
    num_layers: int | None = None
    """Number of decoder layers of the base model; None if it is not known."""
    notes: tuple[str, ...] = ()
    """Remarks on tensors in the files that were left out."""

    @property
    def scaling(self) -> float:
        """The factor of B A in most modules."""
        return lora_scaling(self.lora_alpha, self.r, use_rslora=self.use_rslora)

    @property
    def modules(self) -> tuple[str, ...]:
        """Full paths of the modules with A and B, in the order of the weights."""
        parts = map(split_name, self.weights)
        return tuple(part[0] for part in parts if part is not None and part[1] == "A")

    @property
    def saved(self) -> tuple[str, ...]:
        """Full paths of the modules whose whole weight was trained."""
        parts = map(split_name, self.weights)
        return tuple(part[0] for part in parts if part is not None and part[1] == "weight")

    @property
    def saved_weights(self) -> Tensors:
        """The whole weights that were trained, under their names in weights."""
        return {saved_name(module): self.weights[saved_name(module)] for module in self.saved}

    def has(self, module: str) -> bool:
        """Return whether the adapter has A and B, or a whole weight, for a module."""
        return lora_a_name(module) in self.weights or saved_name(module) in self.weights

    @property
    def use_dora(self) -> bool:
        """True if the modules have DoRA magnitudes."""
        return any(name.endswith(".lora_magnitude_vector") for name in self.weights)

    @property
    def is_uniform(self) -> bool:
        """True if all modules have the same rank and scale."""
        return not self.alphas and all(self.rank(module) == self.r for module in self.modules)

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        return len(self.weights[lora_a_name(module)])

    def alpha_of(self, module: str) -> float:
        """Return lora_alpha of a module."""
        return self.alphas.get(module, self.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """Return the factor of B A in a module."""
        return lora_scaling(self.alpha_of(module), self.rank(module), use_rslora=self.use_rslora)

    def pair(self, module: str) -> tuple[Float32, Float32]:
        """Return A (r, in) and B (out, r) of a module."""
        return self.weights[lora_a_name(module)], self.weights[lora_b_name(module)]

    @property
    def spec(self) -> LoraSpec:
        """The settings from which a backend builds the LoRA layers."""
        layers = {m: LoraLayer(r=self.rank(m), lora_alpha=self.alpha_of(m)) for m in self.modules}
        return LoraSpec(
            layers=layers,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            dropout=self.lora_dropout,
            saved=self.saved,
        )

    def delta(self, module: str) -> Float32:
        """Compute scaling B A of a module, (out, in), in float64, and round it once."""
        a, b = (value.astype(np.float64) for value in self.pair(module))
        return (self.scaling_of(module) * (b @ a)).astype(np.float32)


def with_spec(
    weights: Tensors,
    spec: LoraSpec,
    *,
    lora_dropout: float = 0.0,
    base_model: str | None = None,
    base_identity: str | None = None,
    num_layers: int | None = None,
) -> Adapter:
    """Build the adapter of a model that was opened with a spec."""
    layers = spec.layers
    common = Counter((layer.r, layer.lora_alpha) for layer in layers.values()).most_common(1)
    r, alpha = common[0][0] if common else (1, 1.0)
    alphas = {m: layer.lora_alpha for m, layer in layers.items() if layer.lora_alpha != alpha}
    return Adapter(
        weights=weights,
        r=r,
        lora_alpha=alpha,
        use_rslora=spec.use_rslora,
        alphas=alphas,
        lora_dropout=lora_dropout,
        base_model=base_model,
        base_identity=base_identity,
        num_layers=num_layers,
    )


def with_factors(
    adapter: Adapter, weights: Tensors, alphas: Mapping[str, float], *, use_rslora: bool
) -> Adapter:
    """Replace the tensors of an adapter; each module gets its own rank and lora_alpha."""
    layers = {m: LoraLayer(r=len(weights[lora_a_name(m)]), lora_alpha=a) for m, a in alphas.items()}
    new = with_spec(weights, LoraSpec(layers=layers, use_rslora=use_rslora))
    return dataclasses.replace(
        adapter,
        weights=weights,
        r=new.r,
        lora_alpha=new.lora_alpha,
        use_rslora=use_rslora,
        alphas=new.alphas,
    )


def with_scalings(
    pairs: Mapping[str, tuple[Float32, Float32]], scalings: Mapping[str, float]
) -> Adapter:
    """Build an adapter from factors A (r, in) and B (out, r); each pair has its own scale."""
    layers = {
        m: LoraLayer(r=len(a), lora_alpha=scalings[m] * len(a)) for m, (a, _) in pairs.items()
    }
    weights: Tensors = {}
    for module, (a, b) in pairs.items():
        weights[lora_a_name(module)], weights[lora_b_name(module)] = a, b
    return with_spec(weights, LoraSpec(layers=layers))


def uniform_adapter(adapter: Adapter) -> Adapter:
    """Rewrite an adapter with one rank and one alpha / r; its deltas stay the same.

    Smaller ranks are padded with zeros, and scales that differ are multiplied into B.
    """
    modules = adapter.modules
    if not modules:
        return adapter
    r = max(adapter.rank(module) for module in modules)
    scaling = adapter.scaling
    weights = dict(adapter.weights)
    for module in modules:
        a, b = uniform_pair(adapter, module, r)
        weights[lora_a_name(module)], weights[lora_b_name(module)] = a, b
    return dataclasses.replace(
        adapter, weights=weights, r=r, lora_alpha=scaling * r, use_rslora=False, alphas={}
    )


def uniform_pair(adapter: Adapter, module: str, r: int) -> tuple[Float32, Float32]:
    """Return A and B of a module at rank r >= its own, for the scaling of most modules."""
    a, b = adapter.pair(module)
    ratio = adapter.scaling_of(module) / adapter.scaling
    # Scales this close are two roundings of one number.
    if abs(ratio - 1.0) > 1e-12:
        # A power of two rounds nothing.
        if math.frexp(ratio)[0] != 0.5 and _cancels(a, b):
            a, b = balanced_factors(a, b)
        b = (b.astype(np.float64) * ratio).astype(np.float32)
    missing = r - len(a)
    if missing:
        a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
    return a, b


def _cancels(a: Float32, b: Float32) -> bool:
    """Return whether B A is much smaller than its factors, so that rounding errors grow in it.

    An adapter that was trained with pissa has such factors: its second half subtracts the start.
    """
    size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return size > 100.0 * product_norm(b.astype(np.float64), a.astype(np.float64))


def module_of(name: str) -> str:
    """Return the module that a tensor with a PEFT name belongs to."""
    part = split_name(name)
    return name.removeprefix(PEFT_PREFIX) if part is None else part[0]
