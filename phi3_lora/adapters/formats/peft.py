"""PEFT's format: adapter_model.safetensors with adapter_config.json.

Source: PEFT, tuners/lora/config.py and utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.config_file import is_finite, is_number
from phi3_lora.adapters.formats.fused import is_unfused
from phi3_lora.adapters.formats.record import FolderContent, FolderFormat
from phi3_lora.adapters.names import lora_a_name, short_targets, split_name
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.safetensors import NewTensor, read_all_float32

WEIGHTS_NAME = "adapter_model.safetensors"
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
_UNSUPPORTED = (
    *("layer_replication", "lora_bias", "use_qalora", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora"),
    *("kasa_config", "monteclora_config", "velora_config"),
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, True, None),
    "use_dora": (False, True, None),
    "fan_in_fan_out": (False, None),
    # Phi-3 has no bias that could have been trained.
    "bias": ("none", None, "all", "lora_only"),
    "task_type": ("CAUSAL_LM", None),
    # The others (pissa, olora, corda, loftq ...) change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Values that keep the adapter exact; the first is the default of a missing key."""
_BASE_COPY = ".base_layer.weight"


def is_peft(names: Mapping[str, Any]) -> bool:
    """Return whether tensor names are PEFT's."""
    # Optimizer moments have these names with a further ending.
    return any(name.endswith((".lora_A.weight", ".lora_embedding_A")) for name in names)


def read_peft(path: Path, config: Mapping[str, Any]) -> Adapter:
    """Read the adapter in a PEFT file.

    Raises:
        AdapterError: when the file is damaged or uses a feature that is not supported.
    """
    stored = read_all_float32(path, AdapterError)
    # PEFT adds the base's own matrix where the embedding or the head is adapted.
    copies = [name for name in stored if name.endswith(_BASE_COPY)]
    weights = {name: value for name, value in stored.items() if name not in copies}
    problems = _config_problems(config)
    problems = problems or _name_problems(weights, config)
    if problems:
        raise AdapterError(listing(f"{path} cannot be used:", problems))
    adapter = Adapter(
        weights=weights,
        r=config["r"],
        lora_alpha=float(config["lora_alpha"]),
        use_rslora=bool(config.get("use_rslora", False)),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        base_model=config.get("base_model_name_or_path"),
        alphas=_alphas(weights, config),
        notes=tuple(f"left out a copy of the base's own weight: {name}" for name in copies),
    )
    problems = _rank_problems(adapter, config)
    if problems:
        raise AdapterError(listing(f"the adapter {path} is damaged:", problems))
    return adapter


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{name} = {config[name]!r} is not supported"
        for name in _UNSUPPORTED
        if config.get(name) not in _EMPTY
    ]
    for name, allowed in _ONLY.items():
        if config.get(name, allowed[0]) not in allowed:
            problems.append(
                f"{name} = {config[name]!r} is not supported; allowed: "
                + ", ".join(map(repr, allowed))
            )
    dropout = config.get("lora_dropout") or 0.0
    if not is_number(dropout, int, float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout must be in [0, 1), got {dropout!r}")
    if not isinstance(config.get("base_model_name_or_path"), (str, type(None))):
        problems.append("base_model_name_or_path must be a text")
    if config.get("peft_type") not in (None, "LORA"):
        problems.append(f"peft_type must be LORA, got {config['peft_type']!r}")
    if not is_number(config.get("r"), int) or config["r"] < 1:
        problems.append(f"r must be an integer >= 1, got {config.get('r')!r}")
    if not is_finite(config.get("lora_alpha")):
        problems.append(f"lora_alpha must be a number, got {config.get('lora_alpha')!r}")
    for name, kind in (("rank_pattern", "whole numbers"), ("alpha_pattern", "numbers")):
        if not _is_pattern(config.get(name) or {}, is_whole=name == "rank_pattern"):
            problems.append(f"{name} must map names to {kind} > 0, got {config[name]!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, (str, list)) or not all(isinstance(name, str) for name in saved):
        problems.append(f"modules_to_save must be a list of names, got {saved!r}")
    return [f"adapter_config.json: {problem}" for problem in problems]


def _name_problems(weights: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """List tensors that the configuration does not allow, and tensors that it needs."""
    parts = {name: split_name(name) for name in weights}
    kinds = {part[1] for part in parts.values() if part is not None}
    problems = [f"{n}: not a LoRA tensor of a linear layer" for n, p in parts.items() if p is None]
    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else saved
    for name, part in parts.items():
        if part is not None and part[1] == "weight":
            module = part[0]
            if not any(isinstance(s, str) and module.endswith(s) for s in saved):
                problems.append(f"{name}: not a LoRA tensor, and not in modules_to_save")
    modules = [part[0] for part in parts.values() if part is not None and part[1] == "weight"]
    for wanted in saved:
        if not any(isinstance(wanted, str) and module.endswith(wanted) for module in modules):
            problems.append(
                f"adapter_config.json: modules_to_save names {wanted!r}, whose weight is not there"
            )
    if bool(config.get("use_dora")) != ("m" in kinds) and "A" in kinds:
        problems.append(
            f"adapter_config.json: use_dora = {config.get('use_dora')!r}, but there are "
            f"{'' if 'm' in kinds else 'no '}lora_magnitude_vector tensors"
        )
    return problems


def _is_pattern(value: Any, *, is_whole: bool) -> bool:
    return isinstance(value, dict) and all(
        is_finite(number) and number > 0 and (isinstance(number, int) or not is_whole)
        for number in value.values()
    )


def _alphas(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float]:
    """Return lora_alpha of the modules where alpha_pattern changes it."""
    pattern, default = config.get("alpha_pattern") or {}, float(config["lora_alpha"])
    modules = [part[0] for part in map(split_name, weights) if part is not None and part[1] == "A"]
    found = {module: float(by_pattern(pattern, module, default)) for module in modules}
    return {module: alpha for module, alpha in found.items() if alpha != default}


def _rank_problems(adapter: Adapter, config: Mapping[str, Any]) -> list[str]:
    pattern = config.get("rank_pattern") or {}
    problems = []
    for module in adapter.modules:
        r, found = int(by_pattern(pattern, module, adapter.r)), adapter.weights[lora_a_name(module)]
        if found.shape[:1] != (r,):
            problems.append(
                f"{lora_a_name(module)}: shape {found.shape} does not hold rank {r}, which "
                "adapter_config.json says"
            )
    return problems


def by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first key, a regular expression, that matches a path's ending.

    Raises:
        AdapterError: when a key is not a regular expression.

    Source: PEFT, utils/other.py, get_pattern_key.
    """
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as cause:
            raise AdapterError(
                f"the pattern {key!r} is not a regular expression: {cause}"
            ) from None
    return default


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of adapter_config.json that PEFT reads."""
    modules = adapter.modules
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": adapter.r,
        "lora_alpha": _whole(adapter.lora_alpha),
        "lora_dropout": adapter.lora_dropout,
        "target_modules": short_targets(modules, adapter.num_layers),
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": list(adapter.saved) or None,
        "rank_pattern": _pattern({m: adapter.rank(m) for m in modules}, adapter.r),
        "alpha_pattern": _pattern(
            {m: _whole(adapter.alpha_of(m)) for m in modules},
            _whole(adapter.lora_alpha),
        ),
    }


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return values that are not the default, by ending if all modules of an ending agree."""
    by_ending: dict[str, set[float]] = {}
    for module, value in values.items():
        by_ending.setdefault(module.rsplit(".", 1)[-1], set()).add(value)
    pattern: dict[str, float] = {}
    # A whole path is also an ending of itself, so the short keys come last.
    for module, value in values.items():
        if len(by_ending[module.rsplit(".", 1)[-1]]) > 1 and value != default:
            pattern[re.escape(module)] = value
    for ending, found in by_ending.items():
        if len(found) == 1 and found != {default}:
            pattern[ending] = found.pop()
    return pattern


def peft_tensors(adapter: Adapter) -> dict[str, NewTensor]:
    """Return the tensors of adapter_model.safetensors."""
    return {
        name: NewTensor("F32", value.shape, partial(np.asarray, value))
        for name, value in adapter.weights.items()
    }


def peft_content(adapter: Adapter, base: ModelConfig | None) -> FolderContent:
    """Encode an adapter in PEFT's format."""
    return FolderContent(tensors=peft_tensors(adapter), config=peft_config(adapter))


def _is_fused_peft(names: Mapping[str, Any]) -> bool:
    return is_peft(names) and not is_unfused(names)


PEFT = FolderFormat(
    name="peft",
    tool="PEFT",
    weights_name=WEIGHTS_NAME,
    detect=_is_fused_peft,
    read=read_peft,
    encode=peft_content,
)
