"""Named random streams that are equal on every machine and numpy version.

Only raw 64-bit draws are used: numpy keeps bit generators and SeedSequence stable between
versions, but not the methods of Generator.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
from numpy.typing import NDArray


def raw_stream(seed: int, *labels: str | int, size: int) -> NDArray[np.uint64]:
    """Return raw 64-bit draws of the stream that the seed and the labels name, (size,)."""
    key = [seed, *(crc32(x.encode()) if isinstance(x, str) else x for x in labels)]
    return np.asarray(np.random.PCG64(key).random_raw(size), dtype=np.uint64)


def uniform(seed: int, path: str, shape: tuple[int, ...], bound: float) -> NDArray[np.float32]:
    """Draw from U(-bound, bound) in float32, with the top 24 bits of each raw draw."""
    raw = raw_stream(seed, path, size=int(np.prod(shape)))
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return ((np.float32(2.0) * unit - np.float32(1.0)) * np.float32(bound)).reshape(shape)


def permutation(seed: int, *labels: str | int, size: int) -> NDArray[np.int64]:
    """Return a random permutation of range(size): the stable order of raw 64-bit keys."""
    return np.argsort(raw_stream(seed, *labels, size=size), kind="stable")
