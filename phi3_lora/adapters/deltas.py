"""Deltas of adapters in float64: values, norms, differences and sums."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.adapters.adapter import Adapter, with_factors
from phi3_lora.adapters.factorization import product_norm
from phi3_lora.adapters.names import EMBEDDING, lora_a_name, lora_b_name, magnitude_name, saved_name
from phi3_lora.errors import AdapterError

Float64 = NDArray[np.float64]


class Weighted(NamedTuple):
    """An adapter and the factor of its delta."""

    adapter: Adapter
    weight: float


def change_of_rows(adapter: Adapter, module: str, base: NDArray[np.float32], start: int) -> Float64:
    """Compute the change that an adapter makes to some rows of a stored weight.

    Args:
        adapter: an adapter that has the module.
        module: path of the module.
        base: the rows of the module's weight, (rows, in); a norm's weight is (hidden,).
        start: number of the first row.
    """
    end = start + len(base)
    whole = adapter.weights.get(saved_name(module))
    if whole is not None:
        return whole[start:end].astype(np.float64) - base
    a, b = (value.astype(np.float64) for value in adapter.pair(module))
    scaling = adapter.scaling_of(module)
    if module == EMBEDDING:
        # The table is (vocabulary, hidden): a row belongs to a column of A.
        return scaling * (a[:, start:end].T @ b.T)
    delta = scaling * (b[start:end] @ a)
    magnitude = adapter.weights.get(magnitude_name(module))
    if magnitude is None:
        return delta
    return _dora(base, delta, magnitude[start:end])


def _dora(base: NDArray[np.float32], delta: Float64, magnitude: NDArray[np.float32]) -> Float64:
    """Compute the change of a weight under DoRA.

    Source: DoRA, arXiv 2402.09353, equation 5.
    """
    adapted = base + delta
    norms = np.sqrt(np.einsum("oi,oi->o", adapted, adapted))
    gain = magnitude / np.maximum(norms, np.finfo(np.float64).tiny)
    return np.asarray(gain[:, None] * adapted - base)


def delta_norm(adapter: Adapter, module: str) -> float:
    """Compute the Frobenius norm of scaling B A, without a DoRA magnitude."""
    a, b = (value.astype(np.float64) for value in adapter.pair(module))
    return adapter.scaling_of(module) * product_norm(b, a)


def relative_difference(first: Adapter, second: Adapter) -> dict[str, float]:
    """Compute |difference of the deltas| / |first's delta| by module, in the Frobenius norm.

    A DoRA magnitude counts as a separate delta. A module that only the first adapter has differs
    by 1, a module that only the second has by infinity.
    """
    found = {}
    for module in dict.fromkeys([*first.modules, *second.modules]):
        if _is_same_pair(first, second, module):
            found[module] = 0.0
        else:
            gap, size = _gap_and_size(first, second, module)
            found[module] = 0.0 if gap == 0.0 else gap / size if size else math.inf
        name = magnitude_name(module)
        one, other = first.weights.get(name), second.weights.get(name)
        if (one is None) != (other is None):
            found[module] = math.inf
        elif one is not None and other is not None:
            found[module] = max(found[module], _vector_gap(one, other))
    for module in dict.fromkeys([*first.saved, *second.saved]):
        one = first.weights.get(saved_name(module))
        other = second.weights.get(saved_name(module))
        missing = one is None or other is None
        found[module] = math.inf if missing else _vector_gap(one, other)
    return found


def _is_same_pair(first: Adapter, second: Adapter, module: str) -> bool:
    """Return whether factors and scale of a module are equal, number for number."""
    names = (lora_a_name(module), lora_b_name(module))
    if any(name not in adapter.weights for adapter in (first, second) for name in names):
        return False
    if first.scaling_of(module) != second.scaling_of(module):
        return False
    return all(np.array_equal(first.weights[name], second.weights[name]) for name in names)


def _vector_gap(one: object, other: object) -> float:
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if x.shape != y.shape:
        return math.inf
    return float(np.linalg.norm(x - y) / max(float(np.linalg.norm(x)), 1e-300))


def _gap_and_size(first: Adapter, second: Adapter, module: str) -> tuple[float, float]:
    factors = []
    for adapter, sign in ((first, 1.0), (second, -1.0)):
        if lora_a_name(module) in adapter.weights:
            a, b = (value.astype(np.float64) for value in adapter.pair(module))
            factors.append((a, sign * adapter.scaling_of(module) * b))
    size = delta_norm(first, module) if lora_a_name(module) in first.weights else 0.0
    (a, b), *rest = factors
    if rest:
        other_a, other_b = rest[0]
        if a.shape[1] != other_a.shape[1] or len(b) != len(other_b):
            return math.inf, size
        a, b = np.concatenate([a, other_a]), np.concatenate([b, other_b], axis=1)
    return product_norm(b, a), size


def factor_difference(source: Adapter, written: Adapter) -> float | None:
    """Return the largest difference of a number in the factors, with scales put into B.

    None if the two adapters have other modules, or factors that do not correspond.
    """
    if set(source.modules) != set(written.modules):
        return None
    gaps = [_pair_difference(source, written, module) for module in source.modules]
    factors = {name(m) for m in source.modules for name in (lora_a_name, lora_b_name)}
    for name in (source.weights.keys() | written.weights.keys()) - factors:
        first, second = source.weights.get(name), written.weights.get(name)
        gaps.append(None if first is None or second is None else _largest(first - second))
    return None if None in gaps else max((gap for gap in gaps if gap is not None), default=0.0)


def _pair_difference(source: Adapter, written: Adapter, module: str) -> float | None:
    (a, b), (other_a, other_b) = source.pair(module), written.pair(module)
    r = min(len(a), len(other_a))
    if any(f.any() for f in (a[r:], b[:, r:], other_a[r:], other_b[:, r:])):
        return None
    ratio = written.scaling_of(module) / source.scaling_of(module)
    # Two roundings of one scale are the same scale.
    ratio = 1.0 if abs(ratio - 1.0) <= 1e-7 else ratio
    return max(
        _largest(a[:r] - other_a[:r]), _largest(b[:, :r] - other_b[:, :r] * np.float32(ratio))
    )


def _largest(value: Float64 | NDArray[np.float32]) -> float:
    return float(np.abs(value).max(initial=0.0))


def changes_nothing(adapter: Adapter) -> bool:
    """Return whether every delta is 0; False with DoRA or whole weights, which need the base."""
    if adapter.use_dora or adapter.saved:
        return False
    return not any(a.any() and b.any() for a, b in map(adapter.pair, adapter.modules))


def concatenated(parts: Sequence[Weighted]) -> Adapter:
    """Add adapters up to one, exactly: the ranks stand side by side.

    Raises:
        AdapterError: when an adapter uses DoRA or holds whole weights; such a sum is not LoRA.
    """
    for adapter, _ in parts:
        if adapter.use_dora or adapter.saved:
            what = "DoRA" if adapter.use_dora else "whole weights"
            raise AdapterError(f"adapters with {what} have no sum that is an adapter: merge them")
    modules = dict.fromkeys(module for adapter, _ in parts for module in adapter.modules)
    weights, alphas = {}, {}
    for module in modules:
        chosen = [p for p in parts if p.adapter.has(module)]
        scaling = chosen[0].adapter.scaling_of(module)
        pairs = [
            (p.adapter.pair(module), p.weight * p.adapter.scaling_of(module) / scaling)
            for p in chosen
        ]
        a = np.concatenate([a for (a, _), _ in pairs])
        # A later check reports infinity together with the other faults of the sum.
        with np.errstate(over="ignore"):
            scaled = [(b * np.float64(f)).astype(np.float32) for (_, b), f in pairs]
        b = np.concatenate(scaled, axis=1)
        weights[lora_a_name(module)], weights[lora_b_name(module)] = a, b
        alphas[module] = scaling * len(a)
    first = dataclasses.replace(parts[0].adapter, base_identity=None)
    return with_factors(first, weights, alphas, use_rslora=False)
