"""Folding adapters into a base model, a tensor at a time, and how much of them was kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.deltas import Weighted, change_of_rows
from phi3_lora.adapters.formats.folder import check_unused
from phi3_lora.arrays import Float32
from phi3_lora.errors import ModelError
from phi3_lora.export.gguf_model import (
    OUT_TYPE_OF,
    OUT_TYPES,
    as_q8_0,
    check_gguf,
    unchanged_as_stored,
)
from phi3_lora.export.ollama import fill_gguf_folder
from phi3_lora.models.config import DTYPES, ModelConfig
from phi3_lora.models.quantization.folder import dense_weight
from phi3_lora.models.writer import write_companions, write_shards
from phi3_lora.storage.atomic import replace_folder
from phi3_lora.storage.optional import gguf_package
from phi3_lora.storage.safetensors import (
    FLOAT_TYPES,
    STORED_AS,
    NewTensor,
    TensorInfo,
    from_float32,
    read_parts,
    read_raw,
    to_float32,
)

_BLOCK_ELEMENTS = 1 << 22
"""Elements of a weight that are merged at once, in float64."""


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of the adapters' delta the stored weights of a module hold."""

    cosine: float
    """Between the delta and the change of the stored weights; 1 is its whole direction."""
    norm_ratio: float
    """|change| / |delta|; 1 is its whole size."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What a merge did."""

    path: str
    dtype: str
    """Of a GGUF file its output type."""
    survival: dict[str, Survival]
    """By module path, of the modules with a delta that is not 0."""
    notes: list[str] = field(default_factory=list)
    """What llama.cpp does otherwise than the model."""

    @property
    def worst_module(self) -> str | None:
        """The module that kept least of the direction of its delta."""
        return min(self.survival, key=lambda m: self.survival[m].cosine, default=None)

    @property
    def mean_cosine(self) -> float:
        """Over the modules; 1 without any."""
        values = [s.cosine for s in self.survival.values()]
        return float(np.mean(values)) if values else 1.0


def merge(
    source: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    parts: Sequence[Weighted],
    target: Path,
    *,
    dtype: str | None = None,
    dequantized: bool = False,
) -> Merge:
    """Write the base with W + sum of weight * scale * B A in place of W.

    Args:
        source: the base model's folder, its weights checked.
        config: of source.
        tensors: of source.
        parts: at least one; each checked against source.
        target: a folder that does not exist or is empty.
        dtype: float32, bfloat16 or float16 of the result; None is the base's own.
        dequantized: write a base on a shared grid in full; else it is refused.

    Raises:
        AdapterError: when target is in use.
        ModelError: when the base is quantised.
        StorageError: when the disk is full; target stays as it was.
    """
    check_unused(target)
    _check_base(source, config, dequantized=dequantized)
    chosen = dtype or config.dtype
    assert chosen in DTYPES
    merger = _Merger(config, tensors, parts, STORED_AS[chosen])
    changes: dict[str, Any] = {"dtype": chosen, "torch_dtype": chosen}
    changes |= dict.fromkeys(("quantization", "quantization_config"))

    def fill(folder: Path) -> None:
        write_companions(source, config, folder, changes)
        write_shards(folder, merger.tensors())

    replace_folder(target, fill)
    return Merge(str(target), chosen, merger.survival())


def merge_to_gguf(
    source: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    parts: Sequence[Weighted],
    target: Path,
    *,
    out_type: str | None = None,
    dequantized: bool = False,
) -> Merge:
    """Write what merge writes as model.gguf, for llama.cpp, with a Modelfile for Ollama.

    Args:
        source: as merge.
        config: as merge.
        tensors: as merge.
        parts: as merge.
        target: as merge.
        out_type: one of gguf_model's OUT_TYPES; None is the one of the base's dtype.
        dequantized: as merge.

    Raises:
        AdapterError: as merge.
        ModelError: as merge; when the package gguf is missing or llama.cpp cannot hold the model.
        StorageError: as merge.
    """
    check_unused(target)
    _check_base(source, config, dequantized=dequantized)
    gguf_package(ModelError)
    check_gguf(source, config)
    chosen = out_type or OUT_TYPE_OF[config.dtype]
    rounding = as_q8_0 if chosen == "q8_0" else None
    merger = _Merger(config, tensors, parts, OUT_TYPES[chosen].stored_as, rounding)
    notes: list[str] = []

    def fill(folder: Path) -> None:
        made = unchanged_as_stored(merger.tensors(), tensors, merger.changed)
        notes.extend(fill_gguf_folder(folder, source, config, made, out_type=chosen))

    replace_folder(target, fill)
    return Merge(str(target), chosen, merger.survival(), notes)


def _check_base(source: Path, config: ModelConfig, *, dequantized: bool) -> None:
    if config.quantization is None:
        return
    if config.grid_bits is None:
        raise ModelError(
            f"{source} is quantised in a way that only mlx-lm reads: merge into the model that it "
            "was made from"
        )
    if not dequantized:
        raise ModelError(
            f"{source} holds {config.grid_bits}-bit weights, on whose steps most of an adapter is "
            "lost: add --dequantize to write the result in full, or keep base and adapter apart"
        )


class _Merger:
    """Makes the tensors of the merged model as they are written, and keeps account."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        parts: Sequence[Weighted],
        stored_as: str,
        rounding: Callable[[Float32], Float32] | None = None,
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._parts = parts
        self._stored_as = stored_as
        self._rounding = rounding
        self.changed = {m for p in parts for m in (*p.adapter.modules, *p.adapter.saved)}
        self._sums: dict[str, np.ndarray] = {}

    def tensors(self) -> dict[str, NewTensor]:
        """Of a plain, unquantised model."""
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
        # A large embedding in float32, several times over, would be the peak of a merge.
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
        """The sum of all deltas in the rows of base, of which start is the first."""
        found: Any = 0.0
        for adapter, weight in self._parts:
            if adapter.has(module):
                found = found + weight * change_of_rows(adapter, module, base, start)
        return np.asarray(found)

    def survival(self) -> dict[str, Survival]:
        """Of each module whose delta is not 0."""
        found = {}
        for module, (dot, delta, change) in self._sums.items():
            if delta > 0:
                cosine = dot / math.sqrt(delta * change) if change > 0 else 0.0
                found[module] = Survival(cosine, math.sqrt(change / delta))
        return found
