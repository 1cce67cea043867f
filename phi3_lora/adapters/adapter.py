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
    """LoRA weights under PEFT names, with what is needed to use them.

    The form in the middle of every conversion. A module's rank is that of its own tensors.
    """

    weights: Tensors
    r: int
    """The rank of most modules."""
    lora_alpha: float
    use_rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    """lora_alpha of the modules that have another one."""
    lora_dropout: float = 0.0
    base_model: str | None = None
    """What the adapter says it was trained on."""
    base_identity: str | None = None
    """The identity of that base, where the adapter carries a fingerprint."""
    num_layers: int | None = None
    """Decoder layers of the base model, where known."""
    notes: tuple[str, ...] = ()
    """What of its files was left aside."""

    @property
    def scaling(self) -> float:
        """What B A is multiplied by in most modules."""
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
        """Those whole weights, under their names here."""
        return {saved_name(module): self.weights[saved_name(module)] for module in self.saved}

    def has(self, module: str) -> bool:
        """Whether it changes a module, by A and B or by a whole weight."""
        return lora_a_name(module) in self.weights or saved_name(module) in self.weights

    @property
    def use_dora(self) -> bool:
        """Whether its modules have magnitudes."""
        return any(name.endswith(".lora_magnitude_vector") for name in self.weights)

    @property
    def is_uniform(self) -> bool:
        """Whether one rank and one scale hold for all."""
        return not self.alphas and all(self.rank(module) == self.r for module in self.modules)

    def rank(self, module: str) -> int:
        """Columns of a module's B."""
        return len(self.weights[lora_a_name(module)])

    def alpha_of(self, module: str) -> float:
        """lora_alpha of a module."""
        return self.alphas.get(module, self.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """What B A of a module is multiplied by."""
        return lora_scaling(self.alpha_of(module), self.rank(module), use_rslora=self.use_rslora)

    def pair(self, module: str) -> tuple[Float32, Float32]:
        """A (r, in) and B (out, r) of a module."""
        return self.weights[lora_a_name(module)], self.weights[lora_b_name(module)]

    @property
    def spec(self) -> LoraSpec:
        """What a backend needs."""
        layers = {m: LoraLayer(r=self.rank(m), lora_alpha=self.alpha_of(m)) for m in self.modules}
        return LoraSpec(
            layers=layers,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            dropout=self.lora_dropout,
            saved=self.saved,
        )

    def delta(self, module: str) -> Float32:
        """Scaling B A of a module, (out, in), in float64 rounded once."""
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
    """The same adapter with other tensors, of ranks and of a lora_alpha for each module."""
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
    """An adapter of factors A (r, in) and B (out, r), each with its own rank and scale."""
    layers = {
        m: LoraLayer(r=len(a), lora_alpha=scalings[m] * len(a)) for m, (a, _) in pairs.items()
    }
    weights: Tensors = {}
    for module, (a, b) in pairs.items():
        weights[lora_a_name(module)], weights[lora_b_name(module)] = a, b
    return with_spec(weights, LoraSpec(layers=layers))


def uniform_adapter(adapter: Adapter) -> Adapter:
    """The same deltas with one rank and one alpha / r: for tools that know only those.

    Ranks are padded with zeros to the largest, and scales that differ are put into B.
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
    """A and B of a module in a rank that is not smaller, for the adapter's own scaling."""
    a, b = adapter.pair(module)
    ratio = adapter.scaling_of(module) / adapter.scaling
    # The ratio of two roundings of one number is no scale of its own.
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
    """Whether B A is much smaller than its factors, so that their roundings would be large in it.

    So it is where an adapter takes a start from the weights off again, as pissa's does.
    """
    size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return size > 100.0 * product_norm(b.astype(np.float64), a.astype(np.float64))


def module_of(name: str) -> str:
    """The module that a PEFT name belongs to."""
    part = split_name(name)
    return name.removeprefix(PEFT_PREFIX) if part is None else part[0]
