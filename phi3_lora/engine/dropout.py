"""Dropout masks from a counter hash: bit-equal on every backend and for every layout.

A mask depends on (seed, step, document, position, module, feature). A document is identified by
its content, so batching, packing and ranks do not change the mask.

Source: lowbias32, Chris Wellons, "Prospecting for Hash Functions" (2018).
"""

from __future__ import annotations

import itertools
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Bool
from phi3_lora.engine.protocol import Batch
from phi3_lora.engine.rope import positions

UInt32 = NDArray[np.uint32]
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_GOLDEN = np.uint32(0x9E3779B9)


def lowbias32(x: UInt32) -> UInt32:
    """Return a hash of each 32-bit value."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(MULTIPLIERS[0])
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(MULTIPLIERS[1])
    return x ^ (x >> np.uint32(16))


def row_keys(batch: Batch, *, seed: int, step: int) -> UInt32:
    """Return a key for each token of a batch, (T,)."""
    starts = batch.doc_starts
    documents = [
        crc32(batch.tokens[a:b].astype("<i4").tobytes()) for a, b in itertools.pairwise(starts)
    ]
    key = lowbias32(np.array([seed & 0xFFFFFFFF], np.uint32) + _GOLDEN)
    key = lowbias32(key ^ np.array([step], np.uint32))
    rows = lowbias32(key ^ np.repeat(np.array(documents, np.uint32), np.diff(starts)))
    return lowbias32(rows ^ positions(starts).astype(np.uint32))


def module_key(module: str) -> int:
    """Return the key of a module path."""
    return crc32(module.encode())


def feature_keys(num_features: int) -> UInt32:
    """Return a key for each input feature, (num_features,)."""
    return lowbias32(np.arange(num_features, dtype=np.uint32) * _GOLDEN)


def threshold(probability: float) -> int:
    """Return the bound of a hash's top 24 bits; a feature below it is dropped."""
    return int(probability * 2**24)


def keep_mask(rows: UInt32, module: str, num_features: int, probability: float) -> Bool:
    """Return True for each feature that is kept, (T, num_features); the backends must agree."""
    rows = lowbias32(rows ^ np.uint32(module_key(module)))
    bits = lowbias32(rows[:, None] ^ feature_keys(num_features)[None, :])
    return np.asarray((bits >> np.uint32(8)) >= threshold(probability))
