"""Attention within documents, on the two layouts that layout.py makes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mlx.core as mx

from phi3_lora_mlx.numerics import on_cpu, staged_sum

Attention = Sequence[int] | mx.array | str
"""Bounds of documents laid end to end; a mask (T, T), True where a query may look; or causal."""


def attend(
    q: mx.array, k: mx.array, v: mx.array, *, attention: Attention, scale: float, window: int | None
) -> mx.array:
    """Causal attention of each document to itself.

    Args:
        q: (heads, T, head_dim).
        k: (key-value heads, T, head_dim).
        v: as k.
        attention: the documents.
        scale: of the scores.
        window: keys a query sees at most, itself included.

    Returns:
        (heads, T, head_dim).
    """
    if isinstance(attention, str):
        return _causal(q, k, v, scale=scale, window=window)
    if isinstance(attention, mx.array):
        return _masked(q, k, v, scale=scale, mask=attention)
    parts = []
    for start, end in itertools.pairwise(attention):
        span = slice(start, end)
        parts.append(_causal(q[:, span], k[:, span], v[:, span], scale=scale, window=window))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _causal(q: mx.array, k: mx.array, v: mx.array, *, scale: float, window: int | None) -> mx.array:
    length = q.shape[1]
    # MLX's CPU sums a softmax in one running total; a GPU sums in stages of its own.
    if on_cpu():
        return staged_attention(q, k, v, scale=scale, mask=window_mask(length, window))
    if window is not None and length > window:
        return _masked(q, k, v, scale=scale, mask=window_mask(length, window))
    out = mx.fast.scaled_dot_product_attention(
        q[None], k[None], v[None], scale=scale, mask="causal"
    )
    return out[0]


def _masked(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array) -> mx.array:
    out = mx.fast.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, mask=mask)
    return out[0]


def window_mask(length: int, window: int | None) -> mx.array:
    """True where a query may look, (length, length)."""
    index = mx.arange(length)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < (window or length))


def staged_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array
) -> mx.array:
    """Attention whose softmax sums in stages; for a CPU."""
    heads, length, head_dim = q.shape
    groups = heads // k.shape[0]
    q = (q * scale).reshape(k.shape[0], groups, length, head_dim)
    scores = q @ k[:, None].swapaxes(-1, -2)
    scores = mx.where(mask, scores, mx.array(-mx.inf, scores.dtype))
    exp = mx.exp(scores - mx.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = (exp / staged_sum(exp)[..., None]) @ v[:, None]
    return out.reshape(heads, length, head_dim)
