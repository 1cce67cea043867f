"""The shared grids: exact products, order of the bits, nearest weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from phi3_lora.models.quantization.grid import Grid, bits_of, dequantize, quantize


def weights(rows: int = 8, columns: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)


def fits(value: np.ndarray, significant_bits: int) -> bool:
    mantissa = np.frexp(value.astype(np.float64))[0] * 2.0**significant_bits
    return bool((np.rint(mantissa) == mantissa).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_and_scale_is_exact_in_float16_and_bfloat16(bits: int) -> None:
    grid = quantize(weights(), bits)
    dense = dequantize(grid)
    assert bits_of(grid) == bits
    assert fits(dense, 8)
    assert fits(grid.scales, {4: 4, 8: 1}[bits])
    assert np.array_equal(dense.astype(np.float16).astype(np.float32), dense)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.095), (8, 0.0095)])
def test_the_error_is_that_of_the_grid(bits: int, most: float) -> None:
    weight = weights(256, 512)
    gap = np.linalg.norm(dequantize(quantize(weight, bits)) - weight) / np.linalg.norm(weight)
    assert 0 < gap < most


def test_words_hold_the_first_input_in_the_lowest_bits() -> None:
    scales = np.full((1, 1), 0.5, np.float32)
    words = np.full((1, 4), 0x88888888, np.uint32)
    words[0, 0] = 0x8888_88F9
    found = dequantize(Grid(words, scales))[0]
    assert found[:3].tolist() == [0.5, 3.5, 0.0]


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_tiny_and_huge_weights_stay_finite(bits: int) -> None:
    weight = np.zeros((3, 64), np.float32)
    weight[1] = 1e-30
    weight[2, 5] = 1e4
    found = dequantize(quantize(weight, bits))
    assert not found[:2].any()
    assert found[2, 5] == pytest.approx(1e4, rel=0.2)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_stay_where_they_are(bits: int) -> None:
    once = dequantize(quantize(weights(), bits))
    assert np.array_equal(dequantize(quantize(once, bits)), once)


def test_the_words_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for bits in (4, 8):
        grid = quantize(weights(64, 128), bits)
        digest.update(grid.words.tobytes() + grid.scales.tobytes())
    assert digest.hexdigest()[:16] == "8888b709dc411857"
