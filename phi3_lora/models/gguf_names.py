"""Phi-3's module paths and llama.cpp's names for them, from the gguf package's name map."""

from __future__ import annotations

import functools
import re

from phi3_lora.errors import ModelError
from phi3_lora.models.config import PROJECTIONS
from phi3_lora.storage.optional import gguf_package

_OUTSIDE_LAYERS = ("model.embed_tokens", "model.norm", "lm_head")
_INSIDE_LAYERS = (*PROJECTIONS, "input_layernorm", "post_attention_layernorm")
_MODEL_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GGUF_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def gguf_name(module: str) -> str:
    """Return llama.cpp's name of a Phi-3 module, without the ending .weight.

    Raises:
        KeyError: when Phi-3 has no such module.
        ModelError: when the package gguf is not installed.
    """
    match = _MODEL_LAYER.fullmatch(module)
    if match is None:
        return _names()[module]
    return f"blk.{match[1]}.{_names()[match[2]]}"


def module_of_gguf_name(name: str) -> str | None:
    """Return the module path for a name of llama.cpp; None if Phi-3 has no such module.

    Args:
        name: without the ending .weight.

    Raises:
        ModelError: when the package gguf is not installed.
    """
    modules = {short: module for module, short in _names().items()}
    match = _GGUF_LAYER.fullmatch(name)
    if match is None:
        module = modules.get(name)
        return module if module in _OUTSIDE_LAYERS else None
    module = modules.get(match[2])
    return f"model.layers.{match[1]}.{module}" if module in _INSIDE_LAYERS else None


@functools.cache
def _names() -> dict[str, str]:
    """Return module path -> name; inside a layer, both without the layer's prefix."""
    gguf = gguf_package(ModelError)
    # One layer is enough, because all have the same names; a bad file cannot ask for a large map.
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, 1)
    names = {module: name_map.get_name(module) for module in _OUTSIDE_LAYERS}
    for path in _INSIDE_LAYERS:
        names[path] = name_map.get_name(f"model.layers.0.{path}").removeprefix("blk.0.")
    return names
