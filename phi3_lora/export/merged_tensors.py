"""Tensors of a base model merged with adapters, computed one at a time during writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from phi3_lora.adapters.deltas import Weighted, change_of_rows
from phi3_lora.arrays import Float32
from phi3_lora.errors import ModelError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.quantization.folder import dense_weight
from phi3_lora.storage.safetensors import (
    FLOAT_TYPES,
    NewTensor,
    TensorInfo,
    from_float32,
    read_parts,
    read_raw,
    to_float32,
)

_BLOCK_ELEMENTS = 1 << 22
"""Number of elements of a weight that are merged at once, in float64."""


@dataclass(frozen=True, slots=True)
class Survival:
    """Measures of how much of a module's delta its stored weights keep."""

    cosine: float
    """Cosine between delta and change of the stored weights; 1 keeps the whole direction."""
    norm_ratio: float
    """|change| / |delta|; 1 keeps the whole size."""


class MergedTensors:
    """Tensors of a merged model, with a measure of how much of each delta they keep."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        parts: Sequence[Weighted],
        stored_as: str,
        rounding: Callable[[Float32], Float32] | None = None,
    ) -> None:
        """Store the inputs; tensors are computed later.

        Args:
            config: configuration of the base model.
            tensors: tensors of the base model, by name.
            parts: the adapters and the factors of their deltas.
            stored_as: float type of the result, by its safetensors name.
            rounding: rounds a matrix to the coarser values of the final file, if needed.
        """
        self._config = config
        self._tensors = tensors
        self._parts = parts
        self._stored_as = stored_as
        self._rounding = rounding
        self.changed = {m for p in parts for m in (*p.adapter.modules, *p.adapter.saved)}
        self._sums: dict[str, np.ndarray] = {}

    def tensors(self) -> dict[str, NewTensor]:
        """Return the tensors of a plain, unquantised model, by name."""
        found = {}
        for name, shape in self._config.tensor_shapes().items():
            module = name.removesuffix(".weight")
            make: Any = partial(self._merged, module) if module in self.changed else None
            found[name] = NewTensor(self._stored_as, shape, make or partial(self._copied, name))
        return found

    def _copied(self, name: str) -> np.ndarray:
        info = self._tensors[name]
        if info.dtype == self._stored_as:
            return read_raw(info)
        if info.dtype not in FLOAT_TYPES:
            return self._stored(name, self._base(name.removesuffix(".weight")))
        # Several float32 copies of a large embedding would be the memory peak of a merge.
        parts = [self._stored(name, to_float32(p, info.dtype)) for p in read_parts(info)]
        return np.concatenate(parts).reshape(info.shape)

    def _stored(self, name: str, value: Float32) -> np.ndarray:
        if self._rounding is not None and value.ndim == 2:
            value = self._rounding(value)
        with np.errstate(over="ignore"):
            stored = from_float32(value, self._stored_as)
        if not np.isfinite(to_float32(stored, self._stored_as)).all():
            raise ModelError(
                f"{name} has a number that {self._stored_as} does not hold: merge with --dtype "
                "bfloat16 or float32"
            )
        return stored

    def _base(self, module: str) -> Float32:
        return dense_weight(self._tensors, self._config, module)

    def _merged(self, module: str) -> np.ndarray:
        base = self._base(module)
        rows = max(1, _BLOCK_ELEMENTS * len(base) // base.size)
        sums = np.zeros(3)
        stored = []
        for start in range(0, len(base), rows):
            part = base[start : start + rows]
            delta = self._delta(module, part, start)
            stored.append(self._stored(module, (part + delta).astype(np.float32)))
            change = to_float32(stored[-1], self._stored_as).astype(np.float64) - part
            sums += [np.vdot(delta, change), np.vdot(delta, delta), np.vdot(change, change)]
        self._sums[module] = sums
        return np.concatenate(stored)

    def _delta(self, module: str, base: Float32, start: int) -> np.ndarray:
        """Add up all deltas in the rows of base; start is the number of the first row."""
        found: Any = 0.0
        for adapter, weight in self._parts:
            if adapter.has(module):
                found = found + weight * change_of_rows(adapter, module, base, start)
        return np.asarray(found)

    def survival(self) -> dict[str, Survival]:
        """Measure each module whose delta is not 0, after all tensors are made."""
        found = {}
        for module, (dot, delta, change) in self._sums.items():
            if delta > 0:
                cosine = dot / math.sqrt(delta * change) if change > 0 else 0.0
                found[module] = Survival(cosine, math.sqrt(change / delta))
        return found
