"""Mixing of weighted sources: the number of times that an epoch takes each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Bool
from phi3_lora.engine.random_streams import permutation
from phi3_lora.errors import DataError


def copies(
    weights: Sequence[float],
    counts: Sequence[int],
    left_out: Bool,
    seed: int,
) -> NDArray[np.int64]:
    """Count how often an epoch takes each row: (N,), source after source.

    The whole part of a weight is the number of times that every row of the source is taken. The
    fraction is the share of rows that are taken once more; the seed chooses them.

    Args:
        weights: weight of each source; positive.
        counts: number of rows of each source.
        left_out: (N,) True for rows that must not be taken.
        seed: seed of the choice.

    Raises:
        DataError: when a weight takes no row of a source that has rows.
    """
    taken = np.zeros(len(left_out), dtype=np.int64)
    ends = np.cumsum(counts)
    for i, (weight, end, count) in enumerate(zip(weights, ends, counts, strict=True)):
        there = np.flatnonzero(~left_out[end - count : end]) + end - count
        whole = int(weight)
        num_more = round((weight - whole) * len(there))
        if len(there) and not whole and not num_more:
            raise DataError(
                f"source {i + 1}: a weight of {weight:g} takes none of its {len(there):,} rows: "
                "use a larger weight, or leave the source out"
            )
        taken[there] = whole
        taken[there[permutation(seed, "weight", i, size=len(there))[:num_more]]] += 1
    return taken
