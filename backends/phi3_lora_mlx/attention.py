"""Attention within documents, for both layouts of layout.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from phi3_lora_mlx.numerics import on_cpu, staged_sum

Attention = Sequence[int] | mx.array | str
"""Bounds of documents laid end to end; or a mask (T, T), True where a query may look; or "causal":
one document."""


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    attention: Attention,
    scale: float,
    window: int | None,
    caches: Sequence[KVCache] | None = None,
) -> mx.array:
    """Compute causal attention of each document to itself and to its cache.

    Args:
        q: (heads, T, head_dim).
        k: (key-value heads, T, head_dim).
        v: (key-value heads, T, head_dim).
        attention: the documents, as bounds, a mask or "causal".
        scale: factor of the attention scores.
        window: most keys that a query sees, itself included; None: all earlier keys.
        caches: one cache for each document; only with bounds.

    Returns:
        (heads, T, head_dim).
    """
    if isinstance(attention, str):
        return _causal(q, k, v, scale=scale, window=window)
    if isinstance(attention, mx.array):
        return _masked(q, k, v, scale=scale, mask=attention)
    parts = []
    for i, (start, end) in enumerate(itertools.pairwise(attention)):
        keys, values = k[:, start:end], v[:, start:end]
        if caches is not None:
            keys, values = (x[0] for x in caches[i].update_and_fetch(keys[None], values[None]))
        parts.append(_causal(q[:, start:end], keys, values, scale=scale, window=window))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _causal(q: mx.array, k: mx.array, v: mx.array, *, scale: float, window: int | None) -> mx.array:
    """Compute attention of a document's last tokens to the whole document."""
    new, total = q.shape[1], k.shape[1]
    if new == 1 < total:
        first = max(0, total - (window or total))
        return _masked(q, k[:, first:], v[:, first:], scale=scale, mask=None)
    # On a CPU, MLX sums a softmax in one running total. On a GPU it sums in stages.
    if on_cpu():
        return staged_attention(q, k, v, scale=scale, mask=window_mask(new, total, window))
    if window is not None and total > window:
        return _masked(q, k, v, scale=scale, mask=window_mask(new, total, window))
    return _masked(q, k, v, scale=scale, mask="causal")


def _masked(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None
) -> mx.array:
    out = mx.fast.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, mask=mask)
    return out[0]


def window_mask(new: int, total: int, window: int | None) -> mx.array:
    """Return a mask that is True where a new token may look, (new, total)."""
    index = mx.arange(total)
    distance = index[total - new :, None] - index[None, :]
    return (distance >= 0) & (distance < (window or total))


def staged_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array
) -> mx.array:
    """Compute attention whose softmax sums in stages; for a CPU."""
    heads, length, head_dim = q.shape
    groups = heads // k.shape[0]
    q = (q * scale).reshape(k.shape[0], groups, length, head_dim)
    scores = q @ k[:, None].swapaxes(-1, -2)
    scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
    exp = mx.exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = (exp / staged_sum(exp)[..., None]) @ v[:, None]
    return out.reshape(heads, length, head_dim)
