"""Load a base model with mlx-lm's loader into our Phi-3, and add LoRA layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_with_mlx_lm

from phi3_lora.adapters.names import EMBEDDING
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ModelError
from phi3_lora.models.config import ModelConfig
from phi3_lora_mlx.lora import LoRAEmbedding, LoRALinear, LoraState
from phi3_lora_mlx.phi3 import Embedding, Phi3

_AFFINE_GROUP_SIZE, _AFFINE_BITS = 64, 4
"""Group size and bits of mlx-affine: mlx-lm's defaults."""


class LoadedPhi3:
    """A model, its config, and its LoRA layers by module path."""

    def __init__(self, model: Phi3, config: ModelConfig, dtype: str, device: mx.Device) -> None:
        self.model = model
        self.device = device
        self.config = config
        self.dtype = dtype
        self.state = LoraState()
        self.layers: dict[str, LoRALinear | LoRAEmbedding] = {}
        self.base_weights: dict[str, mx.array] = {}
        """Original weights of the modules whose whole weight trains, by module path."""

    def add_lora(self, spec: LoraSpec) -> None:
        """Replace layers by LoRA layers, and unfreeze the weights of modules_to_save.

        Raises:
            ModelError: when modules_to_save names a quantised module.
        """
        for path in spec.modules:
            parent_path, _, name = path.rpartition(".")
            parent = _descend(self.model, parent_path)
            self.layers[path] = self._layer(getattr(parent, name), path, spec)
            setattr(parent, name, self.layers[path])
        for path in spec.saved:
            module = _descend(self.model, path)
            if "scales" in module:
                raise ModelError(
                    f"modules_to_save: {path} is quantised and cannot be trained whole"
                )
            self.base_weights[path] = module.weight
            if isinstance(module, Embedding):
                module.compute_dtype = module.weight.dtype
            module.weight = module.weight.astype(mx.float32)
            module.unfreeze(keys=["weight"], recurse=False)

    def _layer(self, base: Any, path: str, spec: LoraSpec) -> LoRALinear | LoRAEmbedding:
        r, scaling = spec.layers[path].r, spec.scaling(path)
        if path == EMBEDDING:
            shape = self.config.vocab_size, self.config.hidden_size
            return LoRAEmbedding(base, shape=shape, r=r, scaling=scaling, state=self.state)
        return LoRALinear(
            base,
            module=path,
            r=r,
            scaling=scaling,
            dropout=spec.dropout,
            use_dora=spec.use_dora,
            state=self.state,
        )

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Enter a context that turns the adapter off."""
        modules = {path: _descend(self.model, path) for path in self.base_weights}
        trained = {path: module.weight for path, module in modules.items()}
        try:
            self.state.is_enabled = False
            for path, module in modules.items():
                module.weight = self.base_weights[path]
            yield
        finally:
            self.state.is_enabled = True
            for path, module in modules.items():
                module.weight = trained[path]


def _descend(module: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def load_model(request: LoadRequest, *, on_gpu: bool) -> LoadedPhi3:
    """Load the model of a request; a folder that mlx-lm quantised stays quantised.

    Raises:
        ModelError: when mlx-lm cannot load the folder.
    """
    device = mx.Device(mx.gpu if on_gpu else mx.cpu)
    with mx.stream(device):
        return _load(request, device, on_gpu=on_gpu)


def _load(request: LoadRequest, device: mx.Device, *, on_gpu: bool) -> LoadedPhi3:
    config = request.model.config
    _check_quantization(config, request)

    class Arguments:
        """Stand-in for mlx-lm's model arguments; returns the config that was checked already."""

        @classmethod
        def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
            return config

    dtype = request.compute_dtype(on_gpu=on_gpu)
    try:
        model, _ = load_with_mlx_lm(
            request.model.path, lazy=True, get_model_classes=lambda config: (Phi3, Arguments)
        )
    except (ValueError, RuntimeError, KeyError, OSError) as cause:
        raise ModelError(f"mlx-lm cannot load {request.model.path}: {cause}") from cause
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
    loaded = LoadedPhi3(model, config, dtype, device)
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
        f"{request.model.path} is quantised with {method!r}, which --backend mlx does not read; "
        "use the unquantised model, or one that mlx-lm quantised"
    )


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable arrays by dotted name."""
    return dict(tree_flatten(model.trainable_parameters()))
