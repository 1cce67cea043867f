"""The shared grids: 4- and 8-bit weights that are equal numbers on every backend.

A weight is q * scale, symmetric, with one scale for 32 inputs. Scales have few significant bits: 4,
or 1 for 8-bit weights. So q * scale is exact in float32, float16 and bfloat16, in any order of
operations. The result does not depend on the machine: each step is one IEEE operation, and sums
have a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Float32

GROUP_SIZE = 32
"""Inputs that share a scale."""
GRID_BITS = {"4bit": 4, "8bit": 8}
"""Name of a grid -> bits of a weight."""
GRID_VERSION = 1
"""Version of the rule that chooses scales; cached base models of other versions are not used."""

_STRETCHES = (0.875, 0.9375, 1.0, 1.0625)
"""Divisors that give the candidates for a 4-bit scale; 1 just holds the group's largest weight."""
_SMALLEST_SCALE = np.float32(2.0**-21)
"""Smallest scale to which float16 gives 4 significant bits."""
_BLOCK_ELEMENTS = 1 << 20


class Grid(NamedTuple):
    """A quantised weight (out, in)."""

    words: NDArray[np.uint32]
    """(out, in * bits / 32) q + 2 ** (bits - 1), packed with the first input in the lowest bits."""
    scales: Float32
    """(out, in / 32) one scale for each group."""


def bits_of(grid: Grid) -> int:
    """Return the bits of a weight: a group of 32 weights fills as many words."""
    return int(grid.words.shape[1] // grid.scales.shape[1])


def quantize(weight: Float32, bits: int) -> Grid:
    """Round a weight to the nearest values on a grid.

    Args:
        weight: (out, in), finite; in must be a multiple of 32.
        bits: 4 or 8.
    """
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    blocks = [weight[start : start + rows] for start in range(0, len(weight), rows)]
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda block: _quantize_block(block, bits), blocks))
    return Grid(np.concatenate([p.words for p in parts]), np.concatenate([p.scales for p in parts]))


def dequantize(grid: Grid) -> Float32:
    """Compute the exact dense weight (out, in) of a grid."""
    bits = bits_of(grid)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (grid.words[..., None] >> shifts) & np.uint32(2**bits - 1)
    q = codes.astype(np.float32) - np.float32(2 ** (bits - 1))
    groups = q.reshape(*grid.scales.shape, GROUP_SIZE) * grid.scales[..., None]
    return groups.reshape(len(grid.words), -1)


def _quantize_block(weight: Float32, bits: int) -> Grid:
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    largest = np.abs(groups).max(axis=-1)
    scales = list(_candidates(largest, bits))
    # argmin takes the first of equal errors, so the choice is the same on every machine.
    best = np.argmin([_error(groups, scale, bits) for scale in scales], axis=0)
    best_scale = np.choose(best, scales)
    q = _codes(groups, best_scale, bits) + np.float32(2 ** (bits - 1))
    per_word = 32 // bits
    codes = q.astype(np.uint32).reshape(len(weight), -1, per_word)
    words = np.bitwise_or.reduce(codes << np.arange(0, 32, bits, dtype=np.uint32), axis=-1)
    return Grid(words, best_scale)


def _candidates(largest: Float32, bits: int) -> Iterator[Float32]:
    """Yield the candidate scales of groups with the given largest magnitudes."""
    top = 2 ** (bits - 1)
    if bits == 8:
        # The power of two that clips the largest magnitude by at most half a step.
        _, exponent = np.frexp(largest)
        yield np.maximum(np.ldexp(np.float32(1.0), exponent - (bits - 1)), _SMALLEST_SCALE)
        return
    for stretch in _STRETCHES:
        mantissa, exponent = np.frexp(largest / np.float32(top * stretch))
        rounded = np.ldexp(np.rint(mantissa * np.float32(16)), exponent - 4)
        yield np.maximum(rounded.astype(np.float32), _SMALLEST_SCALE)


def _codes(groups: Float32, scale: Float32, bits: int) -> Float32:
    top = 2 ** (bits - 1)
    codes: Float32 = np.clip(np.rint(groups / scale[..., None]), -top, top - 1)
    return codes


def _error(groups: Float32, scale: Float32, bits: int) -> Float32:
    """Return the sum of squared errors of each group, added in halves for a fixed order."""
    error = (_codes(groups, scale, bits) * scale[..., None] - groups) ** 2
    while error.shape[-1] > 1:
        half = error.shape[-1] // 2
        error = error[..., :half] + error[..., half:]
    return error[..., 0]
