"""Layout of a micro-batch on the device: a pure function of its documents.

On a CPU nothing is padded, and attention slices the documents. On a GPU each shape needs a compiled
step. So rows are padded to a few lengths, and a mask separates the documents.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from phi3_lora.engine.dropout import row_keys
from phi3_lora.engine.protocol import Batch
from phi3_lora.engine.rope import positions, rotary_tables
from phi3_lora.models.config import ModelConfig
from phi3_lora_mlx.attention import Attention
from phi3_lora_mlx.phi3 import Angles

ROW_TOKENS = 2048
"""Most tokens in a padded row of several documents: a mask grows with the square of the length."""
_BUCKET = 256
"""Step between padded lengths. Up to ROW_TOKENS: 8 lengths x 2 numbers of supervised rows."""


class Rows(NamedTuple):
    """A micro-batch as device arrays, with T tokens and S supervised rows (padding included)."""

    tokens: mx.array
    angles: Angles
    attention: Attention
    select: mx.array
    """(S,) positions of the supervised rows."""
    targets: mx.array
    """(S,) next tokens."""
    weights: mx.array
    """(S,) 1.0, or 0.0 for padding."""
    dropout_rows: mx.array | None
    """(T,) dropout keys; None without dropout."""


class DropoutKey(NamedTuple):
    """Seed and step of the dropout masks; the documents are their other input."""

    seed: int
    step: int


def ragged_rows(batch: Batch, config: ModelConfig, dropout: DropoutKey | None) -> Rows:
    """Lay documents end to end without padding."""
    select = np.flatnonzero(batch.loss_mask)
    return Rows(
        tokens=mx.array(batch.tokens),
        angles=_angles(batch, config),
        attention=tuple(batch.doc_starts.tolist()),
        select=mx.array(select),
        targets=mx.array(batch.targets[select]),
        weights=mx.ones((len(select),)),
        dropout_rows=_keys(batch, dropout),
    )


def padded_rows(batch: Batch, config: ModelConfig, dropout: DropoutKey | None) -> Rows:
    """Lay documents end to end and pad them to a bucket; the padding is one more document."""
    length = len(batch.tokens)
    total = padded_length(length)
    starts = batch.doc_starts
    if total > length:
        starts = np.append(starts, total).astype(np.int32)
    fill = total - length
    padded = Batch(
        np.pad(batch.tokens, (0, fill)),
        np.pad(batch.targets, (0, fill)),
        np.pad(batch.loss_mask, (0, fill)),
        starts,
    )
    select = np.flatnonzero(padded.loss_mask)
    count = total // 2 if len(select) <= total // 2 else total
    weights = np.zeros(count, np.float32)
    weights[: len(select)] = 1.0
    select = np.pad(select, (0, count - len(select)))
    attention: Attention = "causal"
    # A single long document needs no mask: its padding follows it, and the mask would be large.
    if total <= ROW_TOKENS or len(batch.doc_starts) > 2:
        attention = mx.array(_mask(padded, config.sliding_window))
    return Rows(
        tokens=mx.array(padded.tokens),
        angles=_angles(padded, config),
        attention=attention,
        select=mx.array(select),
        targets=mx.array(padded.targets[select]),
        weights=mx.array(weights),
        dropout_rows=_keys(padded, dropout),
    )


def padded_length(length: int) -> int:
    """Return the padded length: a multiple of 256 up to ROW_TOKENS, then a power of two."""
    if length <= ROW_TOKENS:
        return -(-length // _BUCKET) * _BUCKET
    return int(2 ** np.ceil(np.log2(length)))


def part_tokens(limit: int, *, is_padded: bool) -> int:
    """Return the most tokens in a micro-batch: the token budget, and if padded, one row."""
    return min(limit, ROW_TOKENS) if is_padded else limit


def _mask(batch: Batch, window: int | None) -> np.ndarray:
    document = np.repeat(np.arange(len(batch.doc_starts) - 1), np.diff(batch.doc_starts))
    position = positions(batch.doc_starts)
    distance = position[:, None] - position[None, :]
    allowed = (document[:, None] == document[None, :]) & (distance >= 0)
    return allowed if window is None else allowed & (distance < window)


def _angles(batch: Batch, config: ModelConfig) -> Angles:
    return Angles(*(mx.array(table) for table in rotary_tables(config, batch.doc_starts)))


def _keys(batch: Batch, dropout: DropoutKey | None) -> mx.array | None:
    if dropout is None:
        return None
    return mx.array(row_keys(batch, seed=dropout.seed, step=dropout.step))
