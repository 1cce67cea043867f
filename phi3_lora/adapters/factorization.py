"""Deterministic factorizations of weights and of products B A."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Float32
from phi3_lora.engine.random_streams import uniform
from phi3_lora.errors import ConfigError

_OVERSAMPLING = 10
_POWER_ITERATIONS = 8
"""Trained weights have singular values that fall slowly and need this many."""


class Factors(NamedTuple):
    """Factors A and B of a weight (out, in)."""

    a: Float32
    """(r, in)."""
    b: Float32
    """(out, r)."""


def pissa_factors(
    weight: Float32, r: int, *, scaling: float, niter: int | None, seed: int, path: str
) -> Factors:
    """Factor the largest r singular triplets of a weight evenly into B and A, over scaling.

    Args:
        weight: (out, in).
        r: at most min(out, in).
        scaling: scale of the layer; scaling B A is the sum of the triplets.
        niter: power iterations; None takes enough for a close result.
        seed: seed of the decomposition's random start.
        path: path of the module, which also seeds the start.

    Source: PiSSA, arXiv 2404.02948, equation 2; PEFT, tuners/lora/layer.py, pissa_init.
    """
    _check_rank(weight, r, path)
    u, s, vt = randomised_svd(weight, r, niter=niter, seed=seed, path=path)
    root = np.sqrt(s / scaling)
    return Factors((root[:, None] * vt).astype(np.float32), (u * root).astype(np.float32))


def olora_factors(weight: Float32, r: int) -> Factors:
    """Return the first r columns of Q and rows of R in W = Q R, with the diagonal of R > 0.

    Q's first columns depend on W's first columns alone, so only these columns are decomposed.

    Source: OLoRA, arXiv 2406.01775, algorithm 1; PEFT, tuners/lora/layer.py, olora_init.
    """
    _check_rank(weight, r, "olora")
    q, upper = np.linalg.qr(weight[:, :r].astype(np.float64))
    q *= np.where(np.diag(upper) < 0, -1.0, 1.0)
    return Factors((q.T @ weight).astype(np.float32), q.astype(np.float32))


def randomised_svd(
    weight: Float32, r: int, *, niter: int | None, seed: int, path: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Compute U (out, r), S (r,) and V^T (r, in) of the largest r singular values.

    The largest entry by size in each column of U is positive, which fixes the signs.

    Source: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    matrix = weight.astype(np.float64)
    width = min(r + _OVERSAMPLING, *weight.shape)
    start = uniform(seed, f"svd {path}", (weight.shape[1], width), 1.0).astype(np.float64)
    q, _ = np.linalg.qr(matrix @ start)
    for _ in range(_POWER_ITERATIONS if niter is None else niter):
        q, _ = np.linalg.qr(matrix.T @ q)
        q, _ = np.linalg.qr(matrix @ q)
    small_u, s, vt = np.linalg.svd(q.T @ matrix, full_matrices=False)
    u = (q @ small_u)[:, :r]
    largest = u[np.abs(u).argmax(axis=0), np.arange(r)]
    signs = np.where(largest < 0, -1.0, 1.0)
    return u * signs, s[:r], vt[:r] * signs[:, None]


def product_norm(b: NDArray[np.float64], a: NDArray[np.float64]) -> float:
    """Compute |B A| without the product: A^T = Q R gives |B R^T|, accurate under cancellation."""
    upper = np.asarray(np.linalg.qr(a.T, mode="r"))
    return float(np.linalg.norm(b @ upper.T))


def balanced_factors(a: Float32, b: Float32, r: int | None = None) -> Factors:
    """Factor B A again, evenly by its singular values, so that no terms cancel.

    Args:
        a: (R, in).
        b: (out, R).
        r: number of singular values to keep; None keeps R, and the product stays the same.

    Source: B A = Q_b (R_b R_a^T) Q_a^T, so only a matrix (R, R) is decomposed.
    """
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = len(a) if r is None else r
    root = np.sqrt(s[:kept])
    new_a = (root[:, None] * (vt[:kept] @ q_a.T)).astype(np.float32)
    new_b = ((q_b @ u[:, :kept]) * root).astype(np.float32)
    # A weight smaller than the rank has fewer singular values than the rank.
    missing = kept - len(new_a)
    return Factors(np.pad(new_a, ((0, missing), (0, 0))), np.pad(new_b, ((0, 0), (0, missing))))


def _check_rank(weight: Float32, r: int, path: str) -> None:
    if r > min(weight.shape):
        raise ConfigError(
            f"{path}: rank {r} is more than a weight of {weight.shape} has; choose a smaller --rank"
        )
