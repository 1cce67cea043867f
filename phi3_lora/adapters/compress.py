"""An adapter cut down to a rank, as close as that rank allows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.errors import AdapterError


def compressed(adapter: Adapter, r: int) -> tuple[Adapter, dict[str, float]]:
    """The nearest deltas of at most a rank, and by module how much of its delta is lost.

    Only modules above that rank change; scales stay.

    Args:
        adapter: of any ranks, without DoRA.
        r: the largest rank that stays.

    Returns:
        The adapter, and |lost| / |delta| in the Frobenius norm of each module that was cut.

    Source: Eckart and Young, 1936: the largest r singular triplets. B A = Q_b (R_b R_a^T) Q_a^T, so
    only a matrix of the old ranks is decomposed.
    """
    if adapter.use_dora:
        raise AdapterError(
            "--rank: with DoRA a smaller rank changes every row's norm: leave it out"
        )
    weights, alphas, lost = dict(adapter.weights), dict(adapter.alphas), {}
    for module in adapter.modules:
        scaling = adapter.scaling_of(module)
        if adapter.rank(module) <= r:
            continue
        a, b = (value.astype(np.float64) for value in adapter.pair(module))
        q_a, r_a = np.linalg.qr(a.T)
        q_b, r_b = np.linalg.qr(b)
        u, s, vt = np.linalg.svd(r_b @ r_a.T)
        root = np.sqrt(s[:r])
        weights[lora_a_name(module)] = (root[:, None] * (vt[:r] @ q_a.T)).astype(np.float32)
        weights[lora_b_name(module)] = ((q_b @ u[:, :r]) * root).astype(np.float32)
        alphas[module] = scaling * (math.sqrt(r) if adapter.use_rslora else r)
        whole = float(np.linalg.norm(s))
        lost[module] = float(np.linalg.norm(s[r:])) / whole if whole else 0.0
    default = adapter.lora_alpha if adapter.r <= r else _alpha(adapter, r)
    alphas = {m: alphas.get(m, adapter.lora_alpha) for m in adapter.modules}
    alphas = {m: alpha for m, alpha in alphas.items() if alpha != default}
    cut = dataclasses.replace(
        adapter, weights=weights, r=min(adapter.r, r), lora_alpha=default, alphas=alphas
    )
    return cut, lost


def _alpha(adapter: Adapter, r: int) -> float:
    return adapter.scaling * (math.sqrt(r) if adapter.use_rslora else r)
