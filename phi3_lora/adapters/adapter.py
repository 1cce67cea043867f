"""An adapter in memory, its start, and what must hold of any adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from phi3_lora.adapters.names import PEFT_PREFIX, lora_a_name, lora_b_name
from phi3_lora.backend import Float32, LoraSpec, Tensors, lora_scaling
from phi3_lora.errors import AdapterError, listing
from phi3_lora.seeding import uniform


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """LoRA weights under PEFT names, with what is needed to use them."""

    weights: Tensors
    r: int
    lora_alpha: float
    use_rslora: bool = False
    lora_dropout: float = 0.0
    base_model: str | None = None
    """What the adapter says it was trained on."""
    base_identity: str | None = None
    """The identity of that base, where the adapter carries a fingerprint."""
    num_layers: int | None = None
    """Decoder layers of the base model, where known."""

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return lora_scaling(self.lora_alpha, self.r, use_rslora=self.use_rslora)

    @property
    def modules(self) -> tuple[str, ...]:
        """Full paths of the adapted modules, in the order of the weights."""
        ending = ".lora_A.weight"
        return tuple(
            name[len(PEFT_PREFIX) : -len(ending)] for name in self.weights if name.endswith(ending)
        )

    @property
    def spec(self) -> LoraSpec:
        """What a backend needs."""
        return LoraSpec(
            modules=self.modules, r=self.r, scaling=self.scaling, dropout=self.lora_dropout
        )

    def delta(self, module: str) -> Float32:
        """Scaling B A of a module, (out, in), in float64 rounded once."""
        a = self.weights[lora_a_name(module)].astype(np.float64)
        b = self.weights[lora_b_name(module)].astype(np.float64)
        return (self.scaling * (b @ a)).astype(np.float32)


def initial_weights(shapes: Mapping[str, tuple[int, int]], *, r: int, seed: int) -> Tensors:
    """The start of training: A from the module's own stream, B = 0.

    A is U(-1/sqrt(in), 1/sqrt(in)), the law of PEFT (kaiming_uniform with a = sqrt(5)) and of
    mlx-lm. It depends on (seed, module path, shape) alone.
    """
    weights = {}
    for module, (out_features, in_features) in shapes.items():
        bound = 1.0 / math.sqrt(in_features)
        weights[lora_a_name(module)] = uniform(seed, module, (r, in_features), bound)
        weights[lora_b_name(module)] = np.zeros((out_features, r), dtype=np.float32)
    return weights


def with_one_rank(pairs: Mapping[str, tuple[Float32, Float32]], scaling: float) -> Adapter:
    """An adapter of factors of several ranks, padded with zeros to the largest.

    Args:
        pairs: module -> A (its rank, in) and B (out, its rank).
        scaling: what B A is multiplied by, for all of them.
    """
    r = max(len(a) for a, _ in pairs.values())
    weights: Tensors = {}
    for module, (a, b) in pairs.items():
        weights[lora_a_name(module)] = np.pad(a, ((0, r - len(a)), (0, 0)))
        weights[lora_b_name(module)] = np.pad(b, ((0, 0), (0, r - b.shape[1])))
    return Adapter(weights=weights, r=r, lora_alpha=scaling * r)


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Check an adapter's tensors against each other and against a base model's linear layers.

    Args:
        adapter: the adapter.
        shapes: module path -> (out, in) of the base model.
        where: the adapter's path, for the message.

    Raises:
        AdapterError: one message with every tensor that does not fit.
    """
    problems = pair_problems(adapter.weights, adapter.r)
    for module in adapter.modules:
        if module not in shapes:
            problems.append(f"{module}: the base model has no such linear layer")
            continue
        out_features, in_features = shapes[module]
        a = adapter.weights[lora_a_name(module)]
        b = adapter.weights.get(lora_b_name(module))
        if a.ndim == 2 and a.shape[1] != in_features:
            problems.append(f"{module}: A is {a.shape}, the base model needs (r, {in_features})")
        if b is not None and b.ndim == 2 and b.shape[0] != out_features:
            problems.append(f"{module}: B is {b.shape}, the base model needs ({out_features}, r)")
    if problems:
        raise AdapterError(listing(f"the adapter {where} does not fit:", problems))


def pair_problems(weights: Mapping[str, Float32], r: int | None) -> list[str]:
    """What is wrong with an adapter's tensors, seen without a base model.

    Args:
        weights: under PEFT names.
        r: the rank of all; None lets each pair have its own.
    """
    problems = []
    for name, value in weights.items():
        a_name, b_name = name, name.replace(".lora_A.", ".lora_B.")
        if ".lora_B." in name:
            a_name, b_name = name.replace(".lora_B.", ".lora_A."), name
        other = b_name if name == a_name else a_name
        if other not in weights:
            problems.append(f"{name}: its pair {other} is missing")
        rank = value.shape[0 if name == a_name else -1] if value.ndim == 2 else None
        wanted = r
        if r is None and rank is not None and a_name in weights:
            wanted = len(weights[a_name])
        if rank is None or rank != wanted:
            problems.append(f"{name}: shape {value.shape} does not hold rank {wanted}")
        if not np.isfinite(value).all():
            problems.append(f"{name}: holds NaN or infinity")
    return problems
