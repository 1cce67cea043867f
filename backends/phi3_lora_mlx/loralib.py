"""loralib's layers and functions in MLX: choose what trains, and save and load it.

Use `from phi3_lora_mlx import loralib as lora` where torch code has `import loralib as lora`.
Conv2d is left out, because Phi-3 has no convolution.
Source: microsoft/LoRA, loralib 0.1.2, loralib/utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from phi3_lora.arrays import Tensors
from phi3_lora.errors import AdapterError, ConfigError, listing
from phi3_lora_mlx.loralib_layers import Embedding, Linear, LoRALayer, MergedLinear

__all__ = [
    "Embedding",
    "Linear",
    "LoRALayer",
    "LoadResult",
    "MergedLinear",
    "load_lora_state_dict",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "to_numpy",
]

_BIAS = ("none", "all", "lora_only")


class LoadResult(NamedTuple):
    """Names without a partner after loading, as in torch's load_state_dict."""

    missing_keys: list[str]
    """LoRA arrays of the model that the state lacks; they did not change."""
    unexpected_keys: list[str]
    """Names in the state that the model lacks; they were ignored."""


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze a model except for its LoRA arrays and the chosen biases.

    Args:
        model: a model with layers of this module.
        bias: none; all: every bias of the model; lora_only: the biases of layers with LoRA.

    Raises:
        ConfigError: when bias has another value, or the model has no LoRA array.
    """
    chosen = _chosen(model, bias)
    model.freeze()
    for path, module in model.named_modules():
        names = {f"{path}.{key}" if path else key: key for key in _own_arrays(module)}
        keys = [key for name, key in names.items() if name in chosen]
        module.unfreeze(keys=keys, recurse=False)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, mx.array]:
    """Return a model's LoRA arrays and the chosen biases, by name.

    These are the arrays that mark_only_lora_as_trainable leaves trainable with the same bias.

    Args:
        model: a model with layers of this module.
        bias: none, all or lora_only, as in mark_only_lora_as_trainable.

    Raises:
        ConfigError: when bias has another value, or the model has no LoRA array.
    """
    chosen = _chosen(model, bias)
    return {name: value for name, value in _arrays(model).items() if name in chosen}


def to_numpy(state: Mapping[str, mx.array]) -> Tensors:
    """Convert a state dict to float32 numpy arrays, for torch_pickle.encode_torch_file."""
    return {name: np.array(value.astype(mx.float32)) for name, value in state.items()}


def load_lora_state_dict(
    model: nn.Module, state: Mapping[str, Any], strict: bool = False
) -> LoadResult:
    """Put arrays into a model by name: a LoRA state dict, or pretrained weights before it.

    The model's dtypes do not change. Layers that are merged (after eval()) are merged again. MLX's
    own load_weights(strict=False) checks no shapes, and merged layers would lose the loaded arrays.

    Args:
        model: the model whose arrays are replaced.
        state: arrays of MLX, numpy or torch by name, from lora_state_dict or read_torch_file.
        strict: require each LoRA array of the model in the state, and each name in the model.

    Raises:
        AdapterError: when a shape differs, a value is not finite, no name of the state is in the
            model, or strict finds a difference. The model then does not change.
    """
    current = _arrays(model)
    values = {name: _as_array(state[name]) for name in state if name in current}
    missing = [name for name in current if "lora_" in name and name not in state]
    unexpected = [name for name in state if name not in current]
    problems = list(_misfits(values, current))
    if strict:
        problems += [f"{name}: missing in the state" for name in missing]
        problems += [f"{name}: not in the model" for name in unexpected]
    elif not values:
        problems += [f"{name}: not in the model" for name in unexpected] or ["it is empty"]
    if problems:
        like = next((name for name in current if "lora_" in name), next(iter(current), "none"))
        title = f"the state does not fit the model, whose names are like {like}:"
        raise AdapterError(listing(title, problems))
    merged = [m for m in model.modules() if isinstance(m, LoRALayer) and m.merged]
    for layer in merged:
        layer.unmerge()
    for name, value in values.items():
        _put(model, name, value.astype(current[name].dtype))
    for layer in merged:
        layer.merge()
    return LoadResult(missing, unexpected)


def _arrays(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _own_arrays(module: nn.Module) -> list[str]:
    """Return the names of a module's arrays, without the arrays of its child modules."""

    def is_own(owner: nn.Module, key: str, value: Any) -> bool:
        is_parameter = nn.Module.valid_parameter_filter(owner, key, value)
        return is_parameter and not isinstance(value, nn.Module)

    return [key for key, _ in tree_flatten(module.filter_and_map(is_own))]


def _chosen(model: nn.Module, bias: str) -> set[str]:
    """Return the names of the arrays that are trained and saved."""
    if bias not in _BIAS:
        raise ConfigError(f"bias must be one of {', '.join(_BIAS)}; got {bias!r}")
    names = set(_arrays(model))
    chosen = {name for name in names if "lora_" in name}
    if bias == "lora_only":
        chosen |= {name.split("lora_")[0] + "bias" for name in chosen} & names
    if bias == "all":
        # MLX calls the offsets of a quantised weight "biases"; these are not biases of the model.
        chosen |= {name for name in names if "bias" in name and not name.endswith("biases")}
    if not chosen:
        raise ConfigError(
            f"the model has no LoRA array among its {len(names)}; put Linear, Embedding or "
            "MergedLinear with r > 0 in place of its layers first"
        )
    return chosen


def _as_array(value: Any) -> mx.array:
    return value if isinstance(value, mx.array) else mx.array(np.asarray(value, np.float32))


def _misfits(values: Mapping[str, mx.array], current: Mapping[str, mx.array]) -> Iterable[str]:
    for name, value in values.items():
        if value.shape != current[name].shape:
            yield f"{name}: {value.shape}, but {current[name].shape} in the model"
        elif not mx.isfinite(value).all().item():
            yield f"{name}: not finite"


def _put(model: nn.Module, name: str, value: mx.array) -> None:
    """Replace one array of a model; modules are dicts, and lists of modules are lists."""
    *path, last = [int(key) if key.isdigit() else key for key in name.split(".")]
    owner: Any = model
    for key in path:
        owner = owner[key]
    owner[last] = value
