"""Checks of an adapter's tensors, with and without its base model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.names import (
    EMBEDDING,
    HEAD,
    is_of_phi3,
    lora_a_name,
    lora_b_name,
    magnitude_name,
    saved_name,
    split_name,
)
from phi3_lora.errors import AdapterError, listing


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
        tensor_shapes: shapes of the base model's weights, by name, to check whole weights.

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
                + ("has no weight of this name" if wanted is None else f"needs {wanted}")
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
    """List the faults of an adapter's tensors that show without a base model."""
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
            problems.append(f"{module}: not a module of a Phi-3 model")
    for module in set(adapter.modules) & set(adapter.saved):
        problems.append(f"{module}: a whole weight beside A and B")
    return problems


def pair_problems(weights: Mapping[str, NDArray[np.float32]]) -> list[str]:
    """List incomplete pairs, factors of different ranks, and values that are not finite."""
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
