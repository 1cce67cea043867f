"""PEFT's layout: adapter_model.safetensors with adapter_config.json.

Source: PEFT, tuners/lora/config.py and utils/save_and_load.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, pair_problems, with_one_rank
from phi3_lora.adapters.names import PEFT_PREFIX, lora_a_name, lora_b_name, short_targets
from phi3_lora.backend import Tensors, lora_scaling
from phi3_lora.errors import AdapterError, listing
from phi3_lora.tensor_files import read_all_float32

WEIGHTS_NAME = "adapter_model.safetensors"
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
_UNSUPPORTED = (
    *("use_dora", "modules_to_save", "layer_replication"),
    *("lora_bias", "use_qalora", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config"),
    *("monteclora_config", "velora_config"),
)

_ONLY: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, True, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "task_type": ("CAUSAL_LM", None),
    # The others (pissa, olora, corda, loftq ...) change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Values that can be used without loss; the first is meant where the key is missing."""


def is_peft(names: Mapping[str, Any]) -> bool:
    """Whether tensor names are PEFT's."""
    return any(".lora_A.weight" in name for name in names)


def read_peft(path: Path, config: Mapping[str, Any]) -> Adapter:
    """The adapter in a PEFT file.

    Raises:
        AdapterError: when the file is damaged or holds what cannot be used without loss.
    """
    weights = read_all_float32(path, AdapterError)
    problems = [
        f"adapter_config.json: {name} = {config[name]!r} is not supported"
        for name in _UNSUPPORTED
        if config.get(name) not in _EMPTY
    ]
    problems += [f"{name}: not a LoRA tensor of a linear layer" for name in _foreign(weights)]
    for name, allowed in _ONLY.items():
        if config.get(name, allowed[0]) not in allowed:
            problems.append(
                f"adapter_config.json: {name} = {config[name]!r} is not supported; allowed: "
                + ", ".join(map(repr, allowed))
            )
    dropout = config.get("lora_dropout") or 0.0
    if not is_number(dropout, int, float) or not 0 <= dropout < 1:
        problems.append(f"adapter_config.json: lora_dropout must be in [0, 1), got {dropout!r}")
    if not isinstance(config.get("base_model_name_or_path"), (str, type(None))):
        problems.append("adapter_config.json: base_model_name_or_path must be a text")
    if config.get("peft_type") not in (None, "LORA"):
        problems.append(f"adapter_config.json: peft_type must be LORA, got {config['peft_type']!r}")
    if not is_number(config.get("r"), int) or config["r"] < 1:
        problems.append(f"adapter_config.json: r must be an integer >= 1, got {config.get('r')!r}")
    if not is_number(config.get("lora_alpha"), int, float):
        problems.append(
            f"adapter_config.json: lora_alpha must be a number, got {config.get('lora_alpha')!r}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not _is_pattern(config.get(name) or {}):
            problems.append(f"adapter_config.json: {name} must map names to numbers > 0")
    if problems:
        raise AdapterError(listing(f"{path} cannot be used:", problems))
    adapter = Adapter(
        weights=weights,
        r=config["r"],
        lora_alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora", False)),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        base_model=config.get("base_model_name_or_path"),
    )
    return _without_patterns(adapter, config)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_number(number, int, float) and 0 < number < math.inf for number in value.values()
    )


def _without_patterns(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The same deltas with one rank and one scale: ranks padded with zeros, scales put into B.

    Raises:
        AdapterError: when a pattern is no regular expression, or a tensor has another rank.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return adapter
    problems = list(pair_problems(adapter.weights, None))
    if problems:
        raise AdapterError(listing("the adapter is damaged:", problems))
    pairs = {}
    for module in adapter.modules:
        r = int(_by_pattern(ranks, module, adapter.r))
        alpha = _by_pattern(alphas, module, adapter.lora_alpha)
        a, b = adapter.weights[lora_a_name(module)], adapter.weights[lora_b_name(module)]
        if len(a) != r:
            problems.append(f"{module}: rank {len(a)}, adapter_config.json says {r}")
        ratio = lora_scaling(alpha, r, use_rslora=adapter.use_rslora) / adapter.scaling
        pairs[module] = a, b if ratio == 1.0 else (b.astype(np.float64) * ratio).astype(np.float32)
    if problems:
        raise AdapterError(listing("the adapter is damaged:", problems))
    plain = with_one_rank(pairs, adapter.scaling)
    return dataclasses.replace(
        adapter, weights=plain.weights, r=plain.r, lora_alpha=plain.lora_alpha, use_rslora=False
    )


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that a module's path ends with.

    Source: PEFT, utils/other.py, get_pattern_key.
    """
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as cause:
            raise AdapterError(
                f"adapter_config.json: the pattern {key!r} is no regular expression: {cause}"
            ) from None
    return default


def is_number(value: Any, *kinds: type) -> bool:
    """Whether a value read from JSON is of these kinds; true and false are no numbers."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _foreign(weights: Mapping[str, Any]) -> list[str]:
    endings = (".lora_A.weight", ".lora_B.weight")
    return [n for n in weights if not (n.startswith(PEFT_PREFIX) and n.endswith(endings))]


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The keys of adapter_config.json that PEFT reads."""
    alpha = adapter.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": adapter.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.lora_dropout,
        "target_modules": short_targets(adapter.modules, adapter.num_layers),
        "use_rslora": adapter.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def peft_tensors(adapter: Adapter) -> Tensors:
    """The tensors of adapter_model.safetensors."""
    return adapter.weights
