"""Sums in stages for MLX on a CPU, where MLX's own sum is one running float32 total.

The error of a running total is 2e-5 over a vocabulary of 32k, and 6.6 % over 28 million terms.
"""

from __future__ import annotations

import mlx.core as mx

_STAGE = 64


def on_cpu() -> bool:
    """Return whether the default device is a CPU, where sums must be staged."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def staged_sum(x: mx.array) -> mx.array:
    """Sum over the last axis in stages of 64 terms."""
    while x.shape[-1] > _STAGE:
        rest = -x.shape[-1] % _STAGE
        if rest:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)])
        x = x.reshape(*x.shape[:-1], -1, _STAGE).sum(axis=-1)
    return x.sum(axis=-1)


def square_norm(x: mx.array) -> mx.array:
    """Return the sum of the squares of all elements."""
    return staged_sum(x.reshape(-1) ** 2)
