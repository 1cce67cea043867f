"""mlx-lm's layout: adapters.safetensors with its keys in adapter_config.json.

Source: mlx-lm, tuner/utils.py (linear_to_lora_layers, load_adapters) and tuner/lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.names import PEFT_PREFIX, lora_a_name, lora_b_name, split_layer
from phi3_lora.adapters.peft_layout import is_number
from phi3_lora.backend import Tensors
from phi3_lora.errors import AdapterError, listing
from phi3_lora.tensor_files import read_all_float32

WEIGHTS_NAME = "adapters.safetensors"


def is_mlx(names: Mapping[str, Any]) -> bool:
    """Whether tensor names are mlx-lm's."""
    return any(name.endswith(".lora_a") for name in names)


def read_mlx(path: Path, config: Mapping[str, Any]) -> Adapter:
    """The adapter in an mlx-lm file; lora_alpha is scale times rank.

    Raises:
        AdapterError: when the file is damaged or its configuration lacks rank or scale.
    """
    stored = read_all_float32(path, AdapterError)
    parameters = config.get("lora_parameters")
    problems = []
    if config.get("fine_tune_type", "lora") != "lora":
        problems.append(f"fine_tune_type {config['fine_tune_type']!r} is not supported, only lora")
    if not isinstance(parameters, dict) or not {"rank", "scale"} <= set(parameters):
        problems.append("adapter_config.json: lora_parameters needs rank and scale")
        parameters = {"rank": 1, "scale": 1.0}
    rank, scale = parameters["rank"], parameters["scale"]
    if not is_number(rank, int) or rank < 1:
        problems.append(f"adapter_config.json: rank must be an integer >= 1, got {rank!r}")
    if not is_number(scale, int, float):
        problems.append(f"adapter_config.json: scale must be a number, got {scale!r}")
    dropout = parameters.get("dropout") or 0.0
    if not is_number(dropout, int, float) or not 0 <= dropout < 1:
        problems.append(f"adapter_config.json: dropout must be in [0, 1), got {dropout!r}")
    foreign = [n for n in stored if not n.endswith((".lora_a", ".lora_b"))]
    problems += [f"{name}: not a LoRA tensor of a linear layer" for name in foreign]
    problems += [f"{n}: must be a matrix, got {v.shape}" for n, v in stored.items() if v.ndim != 2]
    if problems:
        raise AdapterError(listing(f"{path} cannot be used:", problems))
    weights = {}
    for name, value in stored.items():
        module, kind = name.rsplit(".", 1)
        peft_name = lora_a_name(module) if kind == "lora_a" else lora_b_name(module)
        weights[peft_name] = np.ascontiguousarray(value.T)
    return Adapter(
        weights=weights,
        r=rank,
        lora_alpha=float(scale) * rank,
        lora_dropout=float(parameters.get("dropout") or 0.0),
        base_model=config.get("model"),
    )


def why_not_mlx(adapter: Adapter) -> str | None:
    """The reason why mlx-lm cannot hold an adapter, or None.

    mlx-lm adapts the same modules in the last num_layers layers of the model.
    """
    by_layer: dict[int, set[str]] = {}
    for module in adapter.modules:
        place = split_layer(module)
        if place is None:
            return f"{module} lies outside the decoder layers"
        by_layer.setdefault(place[0], set()).add(place[1])
    layers = sorted(by_layer)
    if any(by_layer[i] != by_layer[layers[0]] for i in layers):
        return "its layers do not all have the same modules"
    last = (adapter.num_layers or layers[-1] + 1) - 1
    if layers != list(range(last - len(layers) + 1, last + 1)):
        return "its layers are not the last ones of the model"
    return None


def mlx_config(adapter: Adapter) -> dict[str, Any]:
    """The keys of adapter_config.json that mlx-lm reads."""
    places = [place for place in map(split_layer, adapter.modules) if place is not None]
    return {
        "fine_tune_type": "lora",
        "num_layers": len({layer for layer, _ in places}),
        "lora_parameters": {
            "rank": adapter.r,
            "scale": adapter.scaling,
            "dropout": adapter.lora_dropout,
            "keys": sorted({path for _, path in places}),
        },
    }


def mlx_tensors(adapter: Adapter) -> Tensors:
    """The tensors of adapters.safetensors: lora_a (in, R), lora_b (R, out)."""
    tensors = {}
    for name, value in adapter.weights.items():
        short = name.removeprefix(PEFT_PREFIX)
        short = short.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")
        tensors[short] = np.ascontiguousarray(value.T)
    return tensors
