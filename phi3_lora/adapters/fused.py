"""Adapters of q, k, v and gate, up on their own, as one adapter of the fused projections, and back.

Llama-style copies of Phi-3 (Unsloth, litgpt, torchtune) split the fused weights by rows. Both ways
are exact: a fused B is cut by rows; separate factors are stacked and laid out block-diagonally.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from phi3_lora.adapters.adapter import Adapter, with_one_rank
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.backend import Float32, Tensors
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models import ModelConfig

FUSED_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Fused projection -> its parts, in the order of the rows."""
_FUSED_OF = {part: fused for fused, parts in FUSED_PARTS.items() for part in parts}


def fused_module(module: str) -> str | None:
    """The fused module that a module is a part of, or None."""
    for part, fused in _FUSED_OF.items():
        if module.endswith(f".{part}"):
            return module.removesuffix(part) + fused
    return None


def part_rows(config: ModelConfig) -> dict[str, int]:
    """Rows of each part of a fused projection."""
    heads = config.num_attention_heads * config.head_dim
    key_values = config.num_key_value_heads * config.head_dim
    sizes = (heads, key_values, key_values, config.intermediate_size, config.intermediate_size)
    return dict(zip(_FUSED_OF, sizes, strict=True))


def fuse(adapter: Adapter, config: ModelConfig | None) -> Adapter:
    """The same deltas on fused modules, with one rank for all; unchanged if nothing is split.

    Args:
        adapter: whose tensors come in pairs.
        config: the base model's shape; needed where a part is not adapted.

    Raises:
        AdapterError: when a part is adapted beside its fused module, or its size is not known.
    """
    members: dict[str, list[str]] = {}
    for module in adapter.modules:
        members.setdefault(fused_module(module) or module, []).append(module)
    if all(found == [module] for module, found in members.items()):
        return adapter
    problems, pairs = [], {}
    for module, found in members.items():
        if found == [module]:
            pairs[module] = _pair(adapter, module)
        elif module in found:
            problems.append(f"{module}: adapted as a whole and in parts")
        else:
            try:
                pairs[module] = _stack(adapter, module, set(found), config)
            except AdapterError as cause:
                problems.append(str(cause))
    if problems:
        raise AdapterError(listing("the parts cannot be fused:", problems))
    fused = with_one_rank(pairs, adapter.scaling)
    if fused.r == adapter.r:
        return dataclasses.replace(adapter, weights=fused.weights)
    return dataclasses.replace(
        adapter, weights=fused.weights, r=fused.r, lora_alpha=fused.lora_alpha, use_rslora=False
    )


def _pair(adapter: Adapter, module: str) -> tuple[Float32, Float32]:
    return adapter.weights[lora_a_name(module)], adapter.weights[lora_b_name(module)]


def _stack(
    adapter: Adapter, module: str, found: set[str], config: ModelConfig | None
) -> tuple[Float32, Float32]:
    """A (ranks, in) and B (out, ranks) of a fused module, from those parts that are adapted."""
    fused = next(name for name in FUSED_PARTS if module.endswith(name))
    parts = [module.removesuffix(fused) + part for part in FUSED_PARTS[fused]]
    rows = _rows(adapter, parts, found, config)
    pairs = {part: _pair(adapter, part) for part in parts if part in found}
    first = next(iter(pairs.values()))[0]
    # Parts that were cut from a fused adapter share A: then its own rank is enough.
    is_shared = all(np.array_equal(a, first) for a, _ in pairs.values())
    ranks = [0 if is_shared else len(a) for a, _ in pairs.values()]
    b = np.zeros((sum(rows.values()), len(first) if is_shared else sum(ranks)), np.float32)
    row = column = 0
    for part in parts:
        if part in pairs:
            part_b = pairs[part][1]
            b[row : row + rows[part], column : column + part_b.shape[1]] = part_b
            column += 0 if is_shared else part_b.shape[1]
        row += rows[part]
    return first if is_shared else np.concatenate([a for a, _ in pairs.values()]), b


def _rows(
    adapter: Adapter, parts: list[str], found: set[str], config: ModelConfig | None
) -> dict[str, int]:
    known = {} if config is None else part_rows(config)
    rows = {}
    for part in parts:
        suffix = next(name for name in _FUSED_OF if part.endswith(f".{name}"))
        given = len(_pair(adapter, part)[1]) if part in found else None
        if given is not None and known.get(suffix, given) != given:
            raise AdapterError(f"{part}: B has {given} rows, the base model needs {known[suffix]}")
        if given is None and suffix not in known:
            raise AdapterError(
                f"{part}: not adapted, so its size is not known; pass --model, the fused base model"
            )
        rows[part] = known[suffix] if given is None else given
    return rows


def unfuse(adapter: Adapter, config: ModelConfig) -> Adapter:
    """The same deltas on q, k, v and gate, up; rank and scale stay."""
    rows = part_rows(config)
    weights: Tensors = {}
    for module in adapter.modules:
        a, b = _pair(adapter, module)
        fused = next((name for name in FUSED_PARTS if module.endswith(f".{name}")), None)
        if fused is None:
            weights[lora_a_name(module)], weights[lora_b_name(module)] = a, b
            continue
        start = 0
        for part in FUSED_PARTS[fused]:
            name = module.removesuffix(fused) + part
            weights[lora_a_name(name)] = a
            weights[lora_b_name(name)] = np.ascontiguousarray(b[start : start + rows[part]])
            start += rows[part]
    return dataclasses.replace(adapter, weights=weights)


def is_unfused(names: Mapping[str, object]) -> bool:
    """Whether PEFT tensor names hold parts of fused projections."""
    return any(f".{part}.lora_A" in name for name in names for part in _FUSED_OF)
