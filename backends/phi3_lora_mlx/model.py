"""Loading a base model with mlx-lm's loader into our forward, and putting LoRA layers on it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_with_mlx_lm

from phi3_lora.backend import LoadRequest, LoraSpec
from phi3_lora.errors import ModelError
from phi3_lora.model_folder import read_model_config
from phi3_lora.models import ModelConfig
from phi3_lora_mlx.lora import LoRALinear, LoraState
from phi3_lora_mlx.phi3 import Phi3

_AFFINE_GROUP_SIZE, _AFFINE_BITS = 64, 4
"""mlx-lm's defaults."""


class LoadedPhi3:
    """The model, its shape, and its LoRA layers by module path."""

    def __init__(self, model: Phi3, config: ModelConfig, dtype: str) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.state = LoraState()
        self.layers: dict[str, LoRALinear] = {}

    def add_lora(self, spec: LoraSpec) -> None:
        """Replace the named linear layers."""
        for path in spec.modules:
            parent_path, _, name = path.rpartition(".")
            parent = _descend(self.model, parent_path)
            layer = LoRALinear(
                getattr(parent, name),
                module=path,
                r=spec.r,
                scaling=spec.scaling,
                dropout=spec.dropout,
                state=self.state,
            )
            setattr(parent, name, layer)
            self.layers[path] = layer


def _descend(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def load_model(request: LoadRequest, *, on_gpu: bool) -> LoadedPhi3:
    """The model of a request; a folder that mlx-lm quantised stays quantised.

    Raises:
        ModelError: when mlx-lm cannot load the folder.
    """
    config = read_model_config(request.model_dir)
    _check_quantization(config, request)

    class Arguments:
        """What mlx-lm builds a model from; ours is read and checked already."""

        @classmethod
        def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
            return config

    dtype = request.dtype
    if dtype == "auto":
        dtype = request.gpu_dtype or config.dtype if on_gpu else "float32"
    try:
        model, _ = load_with_mlx_lm(
            request.model_dir, lazy=True, get_model_classes=lambda config: (Phi3, Arguments)
        )
    except (ValueError, RuntimeError, KeyError, OSError) as cause:
        raise ModelError(f"mlx-lm cannot load {request.model_dir}: {cause}") from cause
    model.set_dtype(getattr(mx, dtype))
    if request.quantize == "mlx-affine":
        nn.quantize(
            model,
            group_size=_AFFINE_GROUP_SIZE,
            bits=_AFFINE_BITS,
            class_predicate=lambda _, layer: (
                hasattr(layer, "to_quantized") and layer.weight.shape[-1] % _AFFINE_GROUP_SIZE == 0
            ),
        )
    model.freeze()
    mx.eval(model.parameters())
    loaded = LoadedPhi3(model, config, dtype)
    if request.lora is not None:
        loaded.add_lora(request.lora)
        if request.gradient_checkpointing:
            model.checkpoint_activations()
    return loaded


def _check_quantization(config: ModelConfig, request: LoadRequest) -> None:
    quantization = config.quantization
    if quantization is None or {"group_size", "bits"} <= set(quantization):
        return
    method = quantization.get("quant_method", "unknown")
    raise ModelError(
        f"{request.model_dir} is quantised with {method!r}, which --backend mlx does not read; "
        "use the unquantised model, or one that mlx-lm quantised"
    )


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Dotted name -> trainable array."""
    return dict(tree_flatten(model.trainable_parameters()))
