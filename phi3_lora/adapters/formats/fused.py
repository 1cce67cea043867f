"""Conversion between separate q, k, v and gate, up adapters and adapters of fused projections.

Llama-style copies of Phi-3 (Unsloth, litgpt, torchtune) split the fused weights by rows. Both
directions are exact: B is split by rows; separate A are stacked and separate B block-diagonal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from phi3_lora.adapters.adapter import Adapter, with_factors
from phi3_lora.adapters.names import lora_a_name, lora_b_name, magnitude_name
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.engine.lora_spec import Block, LoraSpec, lora_alpha_of
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig

FUSED_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Fused projection -> its parts, in the order of the rows."""
RowNorms = Callable[[str], Float32]
"""From a module of the base model to the norms of its weight rows, (out,)."""
_FUSED_OF = {part: fused for fused, parts in FUSED_PARTS.items() for part in parts}


def fused_module(module: str) -> str | None:
    """Return the fused module that a module is a part of, or None."""
    for part, fused in _FUSED_OF.items():
        if module.endswith(f".{part}"):
            return module.removesuffix(part) + fused
    return None


def part_rows(config: ModelConfig) -> dict[str, int]:
    """Return the number of rows of each part of a fused projection."""
    sizes = (*config.qkv_rows, config.intermediate_size, config.intermediate_size)
    return dict(zip(_FUSED_OF, sizes, strict=True))


def fuse(
    adapter: Adapter, config: ModelConfig | None, row_norms: RowNorms | None = None
) -> Adapter:
    """Move an adapter to fused modules; its deltas stay the same.

    An adapter without separate parts is returned unchanged.

    Args:
        adapter: an adapter whose tensors come in pairs.
        config: configuration of the base model; needed where a part is not adapted.
        row_norms: norms of the base's weight rows; DoRA needs them where a part is not adapted.

    Raises:
        AdapterError: when both a part and its fused module are adapted, or the size of a part is
            not known.
    """
    members: dict[str, list[str]] = {}
    for module in adapter.modules:
        members.setdefault(fused_module(module) or module, []).append(module)
    if all(found == [module] for module, found in members.items()):
        return adapter
    problems: list[str] = []
    weights = adapter.saved_weights
    alphas: dict[str, float] = {}
    for module, found in members.items():
        if found == [module]:
            new, alpha = _own(adapter, module), adapter.alpha_of(module)
        elif module in found:
            problems.append(f"{module}: adapted as a whole and in parts")
            continue
        else:
            try:
                new, alpha = _Stack(adapter, module, set(found), config).fused(row_norms)
            except AdapterError as cause:
                problems.append(str(cause))
                continue
        weights |= new
        alphas[module] = alpha
    if problems:
        raise AdapterError(listing("the parts cannot be fused:", problems))
    return with_factors(adapter, weights, alphas, use_rslora=adapter.use_rslora)


def _own(adapter: Adapter, module: str) -> Tensors:
    """Return the tensors of a module, unchanged."""
    names = (lora_a_name(module), lora_b_name(module), magnitude_name(module))
    return {name: adapter.weights[name] for name in names if name in adapter.weights}


class _Stack:
    """The adapted parts of one fused module."""

    def __init__(
        self, adapter: Adapter, module: str, found: set[str], config: ModelConfig | None
    ) -> None:
        fused = next(name for name in FUSED_PARTS if module.endswith(name))
        self.adapter = adapter
        self.module = module
        self.parts = [module.removesuffix(fused) + part for part in FUSED_PARTS[fused]]
        self.found = [part for part in self.parts if part in found]
        self.rows = _rows(adapter, self.parts, found, config)

    def fused(self, row_norms: RowNorms | None) -> tuple[Tensors, float]:
        """Return the tensors of the fused module, and its lora_alpha."""
        adapter = self.adapter
        pairs = {part: adapter.pair(part) for part in self.found}
        first = self.found[0]
        scaling = adapter.scaling_of(first)
        shared_a = pairs[first][0]
        # Parts that were split from a fused adapter share A, and one copy of A is enough.
        is_shared = all(np.array_equal(a, shared_a) for a, _ in pairs.values())
        ranks = [len(a) for a, _ in pairs.values()]
        r = ranks[0] if is_shared else sum(ranks)
        b = np.zeros((sum(self.rows.values()), r), np.float32)
        row = column = 0
        for part in self.parts:
            if part in pairs:
                own = _rescaled(pairs[part][1], adapter.scaling_of(part) / scaling)
                b[row : row + self.rows[part], column : column + own.shape[1]] = own
                column += 0 if is_shared else own.shape[1]
            row += self.rows[part]
        a = shared_a if is_shared else np.concatenate([a for a, _ in pairs.values()])
        new = {lora_a_name(self.module): a, lora_b_name(self.module): b}
        if adapter.use_dora:
            new[magnitude_name(self.module)] = self._magnitude(row_norms)
        if r == ranks[0]:
            return new, adapter.alpha_of(first)
        return new, lora_alpha_of(scaling, r, use_rslora=adapter.use_rslora)

    def _magnitude(self, row_norms: RowNorms | None) -> Float32:
        """Join the magnitudes; a part without an adapter has the base's row norms."""
        pieces, row = [], 0
        for part in self.parts:
            end = row + self.rows[part]
            if part in self.found:
                pieces.append(self.adapter.weights[magnitude_name(part)])
            elif row_norms is None:
                raise AdapterError(
                    f"{part}: not adapted; DoRA needs the base's weights for it: pass --model, a "
                    "folder with them"
                )
            else:
                pieces.append(row_norms(self.module)[row:end])
            row = end
        return np.concatenate(pieces)


def _rescaled(b: Float32, ratio: float) -> Float32:
    return b if abs(ratio - 1.0) <= 1e-12 else (b.astype(np.float64) * ratio).astype(np.float32)


def _rows(
    adapter: Adapter, parts: list[str], found: set[str], config: ModelConfig | None
) -> dict[str, int]:
    known = {} if config is None else part_rows(config)
    rows = {}
    for part in parts:
        suffix = next(name for name in _FUSED_OF if part.endswith(f".{name}"))
        given = len(adapter.pair(part)[1]) if part in found else None
        if given is not None and known.get(suffix, given) != given:
            raise AdapterError(f"{part}: B has {given} rows, the base model needs {known[suffix]}")
        if given is None and suffix not in known:
            raise AdapterError(
                f"{part}: not adapted, so its size is not known; pass --model, the fused base model"
            )
        rows[part] = known[suffix] if given is None else given
    return rows


def unfuse(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Split an adapter into q, k, v and gate, up; deltas, ranks and scales stay the same."""
    weights = adapter.saved_weights
    alphas: dict[str, float] = {}
    for module in adapter.modules:
        parts = part_slices(module, config)
        for part, rows in (parts or {module: slice(None)}).items():
            a, b = adapter.pair(module)
            weights[lora_a_name(part)] = a
            weights[lora_b_name(part)] = np.ascontiguousarray(b[rows])
            magnitude = adapter.weights.get(magnitude_name(module))
            if magnitude is not None:
                weights[magnitude_name(part)] = np.ascontiguousarray(magnitude[rows])
            if module in adapter.alphas:
                alphas[part] = adapter.alphas[module]
    return dataclasses.replace(adapter, weights=weights, alphas=alphas)


def part_slices(module: str, config: ModelConfig) -> dict[str, slice]:
    """Return full path -> rows of each part of a fused module; empty for any other module."""
    fused = next((name for name in FUSED_PARTS if module.endswith(f".{name}")), None)
    if fused is None:
        return {}
    rows, start, found = part_rows(config), 0, {}
    for part in FUSED_PARTS[fused]:
        found[module.removesuffix(fused) + part] = slice(start, start + rows[part])
        start += rows[part]
    return found


def with_blocks(spec: LoraSpec, weights: Tensors, config: ModelConfig) -> LoraSpec:
    """Restrict each rank of a fused module to the parts where its column of B is not 0.

    An adapter of q and v alone is exactly 0 in the rows of k, and further training keeps it 0.
    A rank whose column is all 0 trains the parts of all other ranks.
    """
    layers = dict(spec.layers)
    for module, layer in spec.layers.items():
        b, parts = weights[lora_b_name(module)], part_slices(module, config)
        acts = {part: b[rows].any(axis=0) for part, rows in parts.items()}
        touched = [part for part, ranks in acts.items() if ranks.any()]
        if not touched:
            continue
        idle = ~np.any(list(acts.values()), axis=0)
        blocks = tuple(
            Block(part, (rows.start, rows.stop), run)
            for part, rows in parts.items()
            if part in touched
            for run in _runs(acts[part] | idle)
        )
        if not all((acts[part] | idle).all() for part in parts):
            layers[module] = dataclasses.replace(layer, blocks=blocks)
    return dataclasses.replace(spec, layers=layers)


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return first and end index of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def is_unfused(names: Mapping[str, object]) -> bool:
    """Return whether PEFT tensor names hold parts of fused projections."""
    return any(name.endswith(f".{part}.lora_A.weight") for name in names for part in _FUSED_OF)
