"""Initial values of the trained tensors, and masks of the elements that train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from phi3_lora.adapters.factorization import Factors, olora_factors, pissa_factors
from phi3_lora.adapters.names import EMBEDDING, lora_a_name, lora_b_name, magnitude_name, saved_name
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.engine.lora_spec import Block, LoraLayer, LoraSpec
from phi3_lora.engine.random_streams import uniform

BaseWeight = Callable[[str], Float32]
"""From a module of the base model to its full weight, (out, in)."""


def initial_weights(
    spec: LoraSpec,
    shapes: Mapping[str, tuple[int, int]],
    *,
    seed: int,
    base: BaseWeight | None = None,
    init: bool | str = True,
) -> Tensors:
    """Compute the initial adapter; its delta is 0.

    A is U(-1/sqrt(in), 1/sqrt(in)) and B is 0, the law of PEFT (kaiming_uniform with a = sqrt(5))
    and of mlx-lm; it depends on (seed, module path, shape) alone. For the embedding A is 0, so that
    a token that never occurs keeps its row, and B has variance 1, as in PEFT and loralib. pissa
    and olora start from factors of the base's weight; fixed ranks subtract the same factors.

    Args:
        spec: the layers and weights to train.
        shapes: module path -> (out, in).
        seed: seed of the run.
        base: reads a weight of the base model; DoRA, whole weights, pissa and olora need it.
        init: True, pissa, pissa_niter_N or olora (init_lora_weights).
    """
    weights: Tensors = {}
    for module, layer in spec.layers.items():
        if init is not True and module != EMBEDDING:
            assert base is not None
            a, b = _decomposed(layer, module, base(module), spec.scaling(module), str(init), seed)
        else:
            a, b = _drawn(layer, module, shapes[module], seed)
        weights[lora_a_name(module)], weights[lora_b_name(module)] = a, b
        if spec.use_dora:
            assert base is not None
            weights[magnitude_name(module)] = row_norms(base(module))
    for module in spec.saved:
        assert base is not None
        weights[saved_name(module)] = base(module)
    return weights


def row_norms(weight: Float32) -> Float32:
    """Compute the Euclidean norm of each row, (out,), with sums in float64."""
    squares = np.einsum("oi,oi->o", weight, weight, dtype=np.float64)
    return np.asarray(np.sqrt(squares), np.float32)


def _blocks(layer: LoraLayer, module: str, out_features: int) -> tuple[Block, ...]:
    """Return the parts of a module; a module that is adapted as a whole is its only part."""
    trained = layer.num_trained or layer.r
    return layer.blocks or (Block(module, (0, out_features), (0, trained)),)


def _drawn(
    layer: LoraLayer, module: str, shape: tuple[int, int], seed: int
) -> tuple[Float32, Float32]:
    out_features, in_features = shape
    if module == EMBEDDING:
        b = uniform(seed, module, (out_features, layer.r), math.sqrt(3.0))
        return np.zeros((layer.r, in_features), np.float32), b
    bound = 1.0 / math.sqrt(in_features)
    pieces = []
    for part, _, (first, end) in _blocks(layer, module, out_features):
        pieces.append(uniform(seed, part, (end - first, in_features), bound))
    return np.concatenate(pieces), np.zeros((out_features, layer.r), np.float32)


def _decomposed(
    layer: LoraLayer, module: str, weight: Float32, scaling: float, init: str, seed: int
) -> tuple[Float32, Float32]:
    """Factor the base's weight into [A; A] and [B, -B]; the second half never trains.

    PEFT subtracts scaling B A from the base. Here the second half subtracts it, so the base stays
    unchanged, quantised or not, and the adapter is a plain LoRA of twice the rank.

    Source: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775; PEFT, tuners/lora/layer.py.
    """
    trained = layer.num_trained
    assert trained is not None and layer.r == 2 * trained
    a = np.zeros((layer.r, weight.shape[1]), np.float32)
    b = np.zeros((len(weight), layer.r), np.float32)
    for part, rows, (first, end) in _blocks(layer, module, len(weight)):
        own: Factors = _factors(weight[slice(*rows)], end - first, scaling, init, seed, part)
        for start, sign in ((0, 1.0), (trained, -1.0)):
            a[start + first : start + end] = own.a
            b[slice(*rows), start + first : start + end] = np.float32(sign) * own.b
    return a, b


def _factors(weight: Float32, r: int, scaling: float, init: str, seed: int, part: str) -> Factors:
    if init == "olora":
        return olora_factors(weight, r)
    niter = int(init.removeprefix("pissa_niter_")) if init != "pissa" else None
    return pissa_factors(weight, r, scaling=scaling, niter=niter, seed=seed, path=part)


def trained_masks(
    spec: LoraSpec, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, NDArray[np.bool_]]:
    """Return masks of the elements that train, by tensor name; other tensors train in full.

    Shapes: A (R, 1), B (out, R), a magnitude (out,).
    """
    masks = {}
    for module, layer in spec.layers.items():
        trained = layer.r if layer.num_trained is None else layer.num_trained
        if trained < layer.r:
            masks[lora_a_name(module)] = np.arange(layer.r)[:, None] < trained
        if trained < layer.r or layer.blocks:
            mask = np.zeros((shapes[module][0], layer.r), bool)
            for _, rows, ranks in _blocks(layer, module, shapes[module][0]):
                mask[slice(*rows), slice(*ranks)] = True
            masks[lora_b_name(module)] = mask
            if spec.use_dora and layer.blocks:
                masks[magnitude_name(module)] = np.asarray(mask.any(axis=1))
    return masks


def num_trained(
    spec: LoraSpec,
    shapes: Mapping[str, tuple[int, int]],
    tensor_shapes: Mapping[str, tuple[int, ...]],
) -> int:
    """Count the numbers that train.

    Args:
        spec: the layers and weights to train.
        shapes: module path -> (out, in).
        tensor_shapes: shapes of the base model's weights, by name.
    """
    total = sum(math.prod(tensor_shapes[f"{module}.weight"]) for module in spec.saved)
    for module, layer in spec.layers.items():
        out_features, in_features = shapes[module]
        blocks = _blocks(layer, module, out_features)
        ranks = {r for block in blocks for r in range(*block.ranks)}
        rows = {row for block in blocks for row in range(*block.rows)}
        total += len(ranks) * in_features
        total += sum((b.ranks[1] - b.ranks[0]) * (b.rows[1] - b.rows[0]) for b in blocks)
        total += len(rows) if spec.use_dora else 0
    return total
