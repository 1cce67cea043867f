"""mlx-lm's format: adapters.safetensors, and keys in adapter_config.json.

Source: mlx-lm, tuner/utils.py (linear_to_lora_layers, load_adapters), tuner/lora.py, tuner/dora.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, uniform_adapter
from phi3_lora.adapters.formats.config_file import is_finite, is_number
from phi3_lora.adapters.formats.peft import is_peft
from phi3_lora.adapters.formats.record import FolderContent, FolderFormat, whole_weights_reason
from phi3_lora.adapters.names import (
    EMBEDDING,
    HEAD,
    lora_a_name,
    lora_b_name,
    magnitude_name,
    split_layer,
    split_name,
)
from phi3_lora.arrays import Tensors
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.safetensors import NewTensor, read_all_float32

WEIGHTS_NAME = "adapters.safetensors"
_PEFT_NAMES = {"lora_a": lora_a_name, "lora_b": lora_b_name, "m": magnitude_name}
_MLX_KINDS = {"A": "lora_a", "B": "lora_b", "m": "m"}


def read_mlx(path: Path, config: Mapping[str, Any]) -> Adapter:
    """Read the adapter in an mlx-lm file; lora_alpha becomes scale times rank.

    Raises:
        AdapterError: when the file is damaged or its configuration lacks rank or scale.
    """
    stored = read_all_float32(path, AdapterError)
    parameters, problems = _parameters(config)
    has_magnitudes = any(name.endswith(".m") for name in stored)
    weights, foreign = from_mlx_tensors(stored)
    if (config.get("fine_tune_type", "lora") == "dora") != has_magnitudes:
        problems.append(
            f"adapter_config.json: fine_tune_type {config.get('fine_tune_type', 'lora')!r} does "
            "not agree with the tensors: only dora has .m beside .lora_a and .lora_b"
        )
    problems += foreign
    if problems:
        raise AdapterError(listing(f"{path} cannot be used:", problems))
    rank = parameters["rank"]
    problems = [
        f"{name}: shape {value.shape} does not hold rank {rank}, which adapter_config.json says"
        for name, value in weights.items()
        if _rank(name, value) not in (rank, None)
    ]
    if problems:
        raise AdapterError(listing(f"the adapter {path} is damaged:", problems))
    scale = scale_of(parameters, rank)
    return Adapter(
        weights=weights,
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=float(parameters.get("dropout") or 0.0),
        base_model=config.get("model"),
    )


def _parameters(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return lora_parameters, and a list of their faults."""
    problems = []
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        problems.append(f"fine_tune_type {kind!r} is not supported; allowed: lora, dora")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not {"rank", "scale"} <= set(parameters):
        problems.append("adapter_config.json: lora_parameters needs rank and scale")
        return {"rank": 1, "scale": 1.0}, problems
    rank, dropout = parameters["rank"], parameters.get("dropout") or 0.0
    if not is_number(rank, int) or rank < 1:
        problems.append(f"adapter_config.json: rank must be an integer >= 1, got {rank!r}")
    for name in ("scale", "alpha"):
        value = parameters.get(name, 1.0)
        if not is_finite(value):
            problems.append(f"adapter_config.json: {name} must be a number, got {value!r:.40}")
    if not is_number(dropout, int, float) or not 0 <= dropout < 1:
        problems.append(f"adapter_config.json: dropout must be in [0, 1), got {dropout!r}")
    return parameters, problems


def from_mlx_tensors(stored: Tensors) -> tuple[Tensors, list[str]]:
    """Rename tensors to PEFT names, drop pairs of zeros, and list names that are not LoRA.

    The function removes tensors from stored one by one to save memory.
    """
    weights: Tensors = {}
    problems = []
    for name in list(stored):
        value = stored.pop(name)
        module, _, kind = name.rpartition(".")
        if kind not in _PEFT_NAMES:
            problems.append(f"{name}: not a LoRA tensor of a linear layer")
        elif value.ndim != (1 if kind == "m" else 2):
            what = "a vector" if kind == "m" else "a matrix"
            problems.append(f"{name}: must be {what}, got {value.shape}")
        else:
            weights[_PEFT_NAMES[kind](module)] = np.ascontiguousarray(value.T)
    return _without_empty_pairs(weights), problems


def _rank(name: str, value: Any) -> int | None:
    part = split_name(name)
    assert part is not None
    return {"A": value.shape[0], "B": value.shape[-1]}.get(part[1])


def _without_empty_pairs(weights: Tensors) -> Tensors:
    """Drop pairs of zeros, which only fill a layer up; a trained A is never all 0."""
    empty = set()
    for name, value in weights.items():
        part = split_name(name)
        if part is None or part[1] != "A" or value.any():
            continue
        b = weights.get(lora_b_name(part[0]))
        if b is not None and not b.any():
            empty |= {name, lora_b_name(part[0])}
    return {name: value for name, value in weights.items() if name not in empty}


def scale_of(parameters: Mapping[str, Any], rank: int) -> float:
    """Return the factor of B A; before 2025-04 it was scale * alpha / rank."""
    older = float(parameters["alpha"]) / rank if "alpha" in parameters else 1.0
    return float(parameters["scale"]) * older


def why_not_mlx(adapter: Adapter) -> str | None:
    """Return the reason why mlx-lm cannot hold an adapter, or None.

    mlx-lm adapts the same modules in the last num_layers layers. LoRA can fill gaps with pairs of
    zeros; DoRA cannot.
    """
    if adapter.saved:
        return whole_weights_reason(adapter)
    for module in adapter.modules:
        if split_layer(module) is None and module not in (EMBEDDING, HEAD):
            return f"{module} lies outside the decoder layers"
    if adapter.use_dora and _missing(adapter):
        return "its layers do not all have the same modules up to the last one, and it uses DoRA"
    return None


def _missing(adapter: Adapter) -> list[tuple[str, str]]:
    """List modules that mlx-lm would also adapt, each with an adapted module of its kind."""
    places = [(m, place) for m in adapter.modules if (place := split_layer(m)) is not None]
    if not places:
        return []
    layers = {layer for _, (layer, _) in places}
    last = (adapter.num_layers or max(layers) + 1) - 1
    like = {path: module for module, (_, path) in places}
    wanted = [(i, path) for i in range(min(layers), last + 1) for path in like]
    adapted = {place for _, place in places}
    return [
        (f"model.layers.{i}.{path}", like[path]) for i, path in wanted if (i, path) not in adapted
    ]


def for_mlx(adapter: Adapter) -> Adapter:
    """Rewrite an adapter with one rank and scale, and fill the gaps in its last layers."""
    plain = uniform_adapter(adapter)
    weights = dict(plain.weights)
    for module, like in _missing(adapter):
        a, b = plain.pair(like)
        weights[lora_a_name(module)] = np.zeros_like(a)
        weights[lora_b_name(module)] = np.zeros_like(b)
    return dataclasses.replace(plain, weights=weights)


def mlx_config(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of adapter_config.json that mlx-lm reads, for a result of for_mlx."""
    places = [place for place in map(split_layer, adapter.modules) if place is not None]
    outside = [module for module in adapter.modules if split_layer(module) is None]
    return {
        "model": adapter.base_model,
        "fine_tune_type": "dora" if adapter.use_dora else "lora",
        "num_layers": len({layer for layer, _ in places}),
        "lora_parameters": {
            "rank": adapter.r,
            "scale": adapter.scaling,
            "dropout": adapter.lora_dropout,
            "keys": sorted({path for _, path in places} | set(outside)),
        },
    }


def mlx_tensors(adapter: Adapter) -> dict[str, NewTensor]:
    """Return the tensors of adapters.safetensors: lora_a (in, R), lora_b (R, out), m (out,)."""
    tensors = {}
    for name, value in adapter.weights.items():
        part = split_name(name)
        assert part is not None
        turned = NewTensor("F32", value.shape[::-1], partial(np.transpose, value))
        tensors[f"{part[0]}.{_MLX_KINDS[part[1]]}"] = turned
    return tensors


def _is_mlx(names: Mapping[str, Any]) -> bool:
    return any(name.endswith(".lora_a") for name in names) and not is_peft(names)


def _encode(adapter: Adapter, base: ModelConfig | None) -> FolderContent:
    tail = for_mlx(adapter)
    return FolderContent(tensors=mlx_tensors(tail), config=mlx_config(tail))


def _conversion_notes(adapter: Adapter) -> list[str]:
    if adapter.num_layers is not None:
        return []
    return [
        "the base model's number of layers is not known, and mlx-lm takes the adapted layers for "
        "its last ones: pass --model to check"
    ]


MLX_LM = FolderFormat(
    name="mlx",
    tool="mlx-lm",
    weights_name=WEIGHTS_NAME,
    detect=_is_mlx,
    read=read_mlx,
    encode=_encode,
    refusal=why_not_mlx,
    conversion_notes=_conversion_notes,
)
