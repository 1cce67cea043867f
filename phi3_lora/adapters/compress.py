"""Truncation of an adapter to a smaller rank by singular value decomposition."""

from __future__ import annotations

import dataclasses

import numpy as np

from phi3_lora.adapters.adapter import Adapter, with_factors
from phi3_lora.adapters.factorization import balanced_factors, product_norm
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.engine.lora_spec import Block, LoraSpec, lora_alpha_of
from phi3_lora.errors import AdapterError


def compressed(adapter: Adapter, r: int) -> tuple[Adapter, dict[str, float]]:
    """Truncate an adapter to a rank, and measure how much of each delta is lost.

    Only modules above the rank change; scales stay.

    Args:
        adapter: an adapter of any ranks, without DoRA.
        r: the largest rank of the result.

    Returns:
        The adapter, and |lost| / |delta| in the Frobenius norm of each module that was cut.

    Source: Eckart and Young, 1936: the largest r singular triplets.
    """
    if adapter.use_dora:
        raise AdapterError(
            "--rank: with DoRA a smaller rank changes every row's norm: leave it out"
        )
    weights, lost = dict(adapter.weights), {}
    alphas = {module: adapter.alpha_of(module) for module in adapter.modules}
    for module in adapter.modules:
        if adapter.rank(module) <= r:
            continue
        a, b = adapter.pair(module)
        new_a, new_b = balanced_factors(a, b, r)
        weights[lora_a_name(module)], weights[lora_b_name(module)] = new_a, new_b
        scaling = adapter.scaling_of(module)
        alphas[module] = lora_alpha_of(scaling, r, use_rslora=adapter.use_rslora)
        whole = product_norm(b.astype(np.float64), a.astype(np.float64))
        both = np.concatenate([b, -new_b], axis=1).astype(np.float64)
        gone = product_norm(both, np.concatenate([a, new_a]).astype(np.float64))
        lost[module] = gone / whole if whole else 0.0
    return with_factors(adapter, weights, alphas, use_rslora=adapter.use_rslora), lost


def drop_initial_factors(adapter: Adapter, spec: LoraSpec) -> Adapter:
    """Refactor a PiSSA or OLoRA adapter so that its two cancelling halves disappear.

    Two large halves that nearly cancel would be noise in half precision. Parts of a fused weight
    stay apart.
    """
    weights = dict(adapter.weights)
    for module, layer in spec.layers.items():
        if layer.num_trained is None or layer.num_trained == layer.r:
            continue
        a, b = adapter.pair(module)
        whole = (Block(module, (0, len(b)), (0, layer.num_trained)),)
        new_a, new_b = np.zeros_like(a), np.zeros_like(b)
        for _, rows, (first, end) in layer.blocks or whole:
            # The trained half, then the fixed half.
            own = [*range(first, end), *range(layer.num_trained + first, layer.num_trained + end)]
            found = balanced_factors(a[own], b[slice(*rows)][:, own])
            new_a[own] = found.a
            new_b[np.ix_(range(*rows), own)] = found.b
        weights[lora_a_name(module)], weights[lora_b_name(module)] = new_a, new_b
    return dataclasses.replace(adapter, weights=weights)
