"""An adapter in memory, and what must hold of any adapter."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi3_lora.adapters.factorization import balanced_factors, product_norm
from phi3_lora.adapters.names import (
    EMBEDDING,
    HEAD,
    PEFT_PREFIX,
    is_of_phi3,
    lora_a_name,
    lora_b_name,
    magnitude_name,
    saved_name,
    split_name,
)
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.engine.lora_spec import LoraLayer, LoraSpec, lora_scaling
from phi3_lora.errors import AdapterError, listing


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
    """The base model that the adapter names, if any."""
    base_identity: str | None = None
    """The identity of that base, where the adapter carries a fingerprint."""
    num_layers: int | None = None
    """Decoder layers of the base model, where known."""
    notes: tuple[str, ...] = ()
    """Notes on parts of its files that were not read."""

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
        """PEFT name -> whole weight."""
        return {saved_name(module): self.weights[saved_name(module)] for module in self.saved}

    def has(self, module: str) -> bool:
        """Return whether the adapter changes a module, by A and B or by a whole weight."""
        return lora_a_name(module) in self.weights or saved_name(module) in self.weights

    @property
    def use_dora(self) -> bool:
        """True if its modules have magnitudes (DoRA)."""
        return any(name.endswith(".lora_magnitude_vector") for name in self.weights)

    @property
    def is_uniform(self) -> bool:
        """True if all modules have the same rank and scale."""
        return not self.alphas and all(self.rank(module) == self.r for module in self.modules)

    def rank(self, module: str) -> int:
        """Columns of a module's B."""
        return len(self.weights[lora_a_name(module)])

    def alpha_of(self, module: str) -> float:
        """lora_alpha of a module."""
        return self.alphas.get(module, self.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """Return the factor of B A of a module."""
        return lora_scaling(self.alpha_of(module), self.rank(module), use_rslora=self.use_rslora)

    def pair(self, module: str) -> tuple[Float32, Float32]:
        """A (r, in) and B (out, r) of a module."""
        return self.weights[lora_a_name(module)], self.weights[lora_b_name(module)]

    @property
    def spec(self) -> LoraSpec:
        """The adapter's layers as a backend needs them."""
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


def with_spec(weights: Tensors, spec: LoraSpec, **facts: Any) -> Adapter:
    """The adapter of a model that was opened with a spec; facts are further fields."""
    layers = spec.layers
    common = Counter((layer.r, layer.lora_alpha) for layer in layers.values()).most_common(1)
    r, alpha = common[0][0] if common else (1, 1.0)
    alphas = {m: layer.lora_alpha for m, layer in layers.items() if layer.lora_alpha != alpha}
    return dataclasses.replace(
        Adapter(weights=weights, r=r, lora_alpha=alpha, use_rslora=spec.use_rslora, alphas=alphas),
        **facts,
    )


def with_factors(
    adapter: Adapter, weights: Tensors, alphas: Mapping[str, float], *, use_rslora: bool
) -> Adapter:
    """Copy an adapter with other tensors, whose ranks and lora_alpha are given by module."""
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
    """Give all modules one rank and one alpha / r with equal deltas, for tools that need that.

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
    """Return whether B A is so small beside its factors that their rounding errors dominate.

    So it is where an adapter takes a start from the weights off again, as pissa's does.
    """
    size = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return size > 100.0 * product_norm(b.astype(np.float64), a.astype(np.float64))


def check_fits(
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, int]],
    where: str,
    tensor_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Check an adapter's tensors against each other and against a base model.

    Args:
        adapter: the adapter.
        shapes: module path -> (out, in) of the layers that LoRA can adapt.
        where: the adapter's path, for the message.
        tensor_shapes: of the base model's weights, by name; for whole weights in the adapter.

    Raises:
        AdapterError: one message with every tensor that does not fit.
    """
    problems = adapter_problems(adapter)
    for module in adapter.modules:
        if module not in shapes:
            problems.append(f"{module}: {_why_missing(module, shapes)}")
            continue
        out_features, in_features = shapes[module]
        a, b = adapter.weights[lora_a_name(module)], adapter.weights.get(lora_b_name(module))
        if a.ndim == 2 and a.shape[1] != in_features:
            problems.append(f"{module}: A is {a.shape}, the base model needs (r, {in_features})")
        if b is not None and b.ndim == 2 and b.shape[0] != out_features:
            problems.append(f"{module}: B is {b.shape}, the base model needs ({out_features}, r)")
    for module in adapter.saved:
        found = adapter.weights[saved_name(module)].shape
        wanted = (tensor_shapes or {}).get(f"{module}.weight")
        if module in (EMBEDDING, HEAD) and EMBEDDING not in shapes:
            problems.append(f"{module}: {_why_missing(module, shapes)}")
        elif wanted != found:
            problems.append(
                f"{module}: a whole weight of {found}, the base model "
                + ("has none of that name" if wanted is None else f"needs {wanted}")
            )
    if problems:
        raise AdapterError(listing(f"the adapter {where} does not fit:", problems))


def _why_missing(module: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    if module in (EMBEDDING, HEAD) and EMBEDDING not in shapes:
        return (
            "this model's head is its embedding, and tools differ in whether an adapter of one "
            "holds for the other"
        )
    return "the base model has no such linear layer"


def adapter_problems(adapter: Adapter) -> list[str]:
    """List the problems of an adapter's tensors that show without a base model."""
    weights = adapter.weights
    problems = pair_problems(weights)
    magnitudes = {m for m in adapter.modules if magnitude_name(m) in weights}
    for module in adapter.modules:
        b = weights.get(lora_b_name(module))
        magnitude = weights.get(magnitude_name(module))
        if not magnitudes or b is None:
            continue
        if module == EMBEDDING:
            problems.append(f"{module}: DoRA on the embedding means different maths in each tool")
        elif magnitude is None:
            problems.append(f"{module}: its DoRA magnitude is missing; other modules have one")
        elif magnitude.shape != b.shape[:1]:
            problems.append(f"{module}: magnitude {magnitude.shape}, B has {len(b)} rows")
    for module in (*adapter.modules, *adapter.saved):
        if not is_of_phi3(module):
            problems.append(f"{module}: no module of a Phi-3 model")
    for module in set(adapter.modules) & set(adapter.saved):
        problems.append(f"{module}: a whole weight beside A and B")
    return problems


def pair_problems(weights: Mapping[str, NDArray[np.float32]]) -> list[str]:
    """Pairs that are not whole, factors that do not belong together, numbers that are none."""
    problems = []
    for name, value in weights.items():
        part = split_name(name)
        if part is None:
            problems.append(f"{name}: not a LoRA tensor of a linear layer")
            continue
        module, kind = part
        if not np.isfinite(value).all():
            problems.append(f"{name}: holds NaN or infinity")
        if kind == "m" and lora_a_name(module) not in weights:
            problems.append(f"{name}: a magnitude without A and B")
        if kind not in ("A", "B"):
            continue
        expected = lora_a_name(module) if kind == "A" else lora_b_name(module)
        if name != expected:
            problems.append(f"{name}: expected under the name {expected}")
        other = lora_b_name(module) if kind == "A" else lora_a_name(module)
        if other not in weights:
            problems.append(f"{name}: its pair {other} is missing")
        a = weights.get(lora_a_name(module), value)
        rank = value.shape[0 if kind == "A" else -1] if value.ndim == 2 else None
        if rank is None or rank < 1 or (kind == "B" and rank != len(a)):
            problems.append(f"{name}: shape {value.shape} does not hold rank {len(a)}")
    return problems


def module_of(name: str) -> str:
    """The module that a PEFT name belongs to."""
    part = split_name(name)
    return name.removeprefix(PEFT_PREFIX) if part is None else part[0]
