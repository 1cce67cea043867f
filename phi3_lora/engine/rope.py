"""Rotary angles for both backends, bit-equal to transformers.

transformers rounds the inverse frequencies and the angles to float32. This rounding is part of the
model: a float64 table is more exact and gives other logits.
"""

from __future__ import annotations

import numpy as np

from phi3_lora.arrays import Float32, Int32
from phi3_lora.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig, *, long: bool) -> Float32:
    """Return the inverse frequencies of the rotated dimensions, (rotary_dim / 2,).

    Source: transformers, modeling_rope_utils.py, _compute_longrope_parameters, and
    modeling_phi3.py, compute_default_rope_parameters.
    """
    rope = config.rope
    dim = config.rotary_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    factors = rope.long_factor if long else rope.short_factor
    if factors is not None:
        power = np.asarray(factors, dtype=np.float32) * power
    return np.float32(1.0) / power


def positions(doc_starts: Int32) -> Int32:
    """Return the position of each token in its document, (T,)."""
    lengths = np.diff(doc_starts)
    total = int(doc_starts[-1])
    return (np.arange(total) - np.repeat(doc_starts[:-1], lengths)).astype(np.int32)


def rotary_tables(config: ModelConfig, doc_starts: Int32) -> tuple[Float32, Float32]:
    """Return cos and sin for whole documents laid end to end, each (T, rotary_dim / 2).

    The length of each document decides between LongRoPE's short and long factors.
    """
    lengths = np.diff(doc_starts)
    where = positions(doc_starts)
    is_long = np.repeat(config.uses_long_factors(lengths), lengths)
    return tables_at(config, where, is_long)


def tables_at(
    config: ModelConfig, where: Int32, is_long: np.ndarray | bool
) -> tuple[Float32, Float32]:
    """Return cos and sin at the given positions, each (T, rotary_dim / 2).

    Args:
        config: the model's shape.
        where: position of each token in its document, (T,).
        is_long: True where the document uses LongRoPE's long factors, (T,) or one for all.
    """
    inverse = np.where(
        np.broadcast_to(np.asarray(is_long), where.shape)[:, None],
        inverse_frequencies(config, long=True),
        inverse_frequencies(config, long=False),
    )
    angle = (where.astype(np.float32)[:, None] * inverse).astype(np.float64)
    scale = config.attention_factor
    return (np.cos(angle) * scale).astype(np.float32), (np.sin(angle) * scale).astype(np.float32)
