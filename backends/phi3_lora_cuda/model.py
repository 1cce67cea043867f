"""Load transformers' Phi-3 and add PEFT's LoRA layers."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import peft
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from phi3_lora.adapters.names import EMBEDDING, lora_a_name, lora_b_name, magnitude_name, saved_name
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ModelError
from phi3_lora_cuda.base import load_base
from phi3_lora_cuda.documents import GivenRotary, has_flash
from phi3_lora_cuda.dropout import DropoutKeys, HashDropout
from phi3_lora_cuda.lora import LoraLinear, TrainedWeight

_ADAPTER = "default"


class LoadedPhi3:
    """transformers' model, its rotary module, and its LoRA layers by module path."""

    def __init__(self, request: LoadRequest, device: torch.device) -> None:
        self.config = request.model.config
        on_gpu = device.type != "cpu"
        self.dtype: torch.dtype = getattr(torch, request.compute_dtype(on_gpu=on_gpu))
        self.causal_lm = load_base(request, self.dtype, device)
        self.rotary = GivenRotary()
        self.causal_lm.model.rotary_emb = self.rotary
        self.dropout_keys = DropoutKeys()
        self.layers: dict[str, Any] = {}
        self.saved: dict[str, TrainedWeight] = {}
        self.peft_model: peft.PeftModel | None = None
        if request.lora is None:
            self.causal_lm.requires_grad_(False)
        else:
            self._add_lora(request.lora)
        if request.gradient_checkpointing:
            with warnings.catch_warnings():
                # transformers warns that the name of this option changes in version 6.
                warnings.simplefilter("ignore")
                self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
            # Without an adapter below the first layer, its input has no gradient by itself.
            self.causal_lm.enable_input_require_grads()
        is_dense = self.config.quantization is None and request.quantize == "none"
        is_plain = is_dense and not (request.lora is not None and request.lora.use_dora)
        self.is_compiled = request.compile and is_plain and can_compile(self.dtype, device)
        if self.is_compiled:
            self._compile_layers()
        self.causal_lm.train(request.lora is not None)

    def _compile_layers(self) -> None:
        """Compile the layers; one graph serves all layers and all lengths."""
        # Without a gradient at its input, the first layer would need a second graph.
        self.causal_lm.enable_input_require_grads()
        for layer in self.causal_lm.model.layers:
            layer.compile(dynamic=True)

    def compiled(self) -> AbstractContextManager[None]:
        """Return a context for training; a layer that cannot be compiled runs uncompiled."""
        if not self.is_compiled:
            return contextlib.nullcontext()
        return torch._dynamo.config.patch(suppress_errors=True)

    def uncompiled(self) -> AbstractContextManager[None]:
        """Return a context for scoring and decoding, which would need other graphs."""
        if not self.is_compiled:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states (S, hidden) to logits (S, vocabulary)."""
        return self.causal_lm.lm_head(hidden)

    @contextlib.contextmanager
    def base_only(self) -> Iterator[None]:
        """Enter a context that turns the adapter off."""
        for module in self.saved.values():
            module.is_enabled = False
        peft_model = self.peft_model
        try:
            with contextlib.nullcontext() if peft_model is None else peft_model.disable_adapter():
                yield
        finally:
            for module in self.saved.values():
                module.is_enabled = True

    def _add_lora(self, spec: LoraSpec) -> None:
        self.causal_lm.requires_grad_(False)
        if spec.layers:
            self._add_layers(spec)
        for path in spec.saved:
            parent_path, _, name = path.rpartition(".")
            self.saved[path] = TrainedWeight(self.causal_lm.get_submodule(path))
            setattr(self.causal_lm.get_submodule(parent_path), name, self.saved[path])

    def _add_layers(self, spec: LoraSpec) -> None:
        first = next(iter(spec.layers.values()))
        config = peft.LoraConfig(
            r=first.r,
            lora_alpha=first.lora_alpha,
            rank_pattern={re.escape(path): layer.r for path, layer in spec.layers.items()},
            target_modules=list(spec.modules),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        config._register_custom_module({nn.Linear: LoraLinear})
        with warnings.catch_warnings():
            # PEFT reads transformers' attributes under deprecated names.
            warnings.simplefilter("ignore")
            self.peft_model = peft.get_peft_model(self.causal_lm, config)
        for path in spec.modules:
            layer = self.causal_lm.get_submodule(path)
            layer.scaling[_ADAPTER] = spec.scaling(path)
            self.layers[path] = layer
            if path == EMBEDDING:
                continue
            if spec.use_dora:
                layer.add_magnitude()
            if spec.dropout > 0:
                layer.lora_dropout[_ADAPTER] = HashDropout(
                    path, layer.in_features, spec.dropout, self.dropout_keys
                )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return all trained parameters under PEFT names.

        They are A (r, in), B (out, r), magnitudes (out,), and the weights of modules_to_save.
        """
        named = {}
        for path, layer in self.layers.items():
            if path == EMBEDDING:
                pair = layer.lora_embedding_A[_ADAPTER], layer.lora_embedding_B[_ADAPTER]
            else:
                pair = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            named[lora_a_name(path)], named[lora_b_name(path)] = pair
            if getattr(layer, "magnitude", None) is not None:
                named[magnitude_name(path)] = layer.magnitude
        for path, module in self.saved.items():
            named[saved_name(path)] = module.weight
        return named


def can_compile(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether layers can be compiled: this needs has_flash, Triton and a C compiler."""
    tools = importlib.util.find_spec("triton") and (shutil.which("cc") or shutil.which("gcc"))
    return has_flash(device, dtype) and bool(tools)


def load_model(request: LoadRequest, device: torch.device) -> LoadedPhi3:
    """Load the model of a request onto a device.

    Raises:
        ModelError: when transformers cannot load the folder.
    """
    try:
        return LoadedPhi3(request, device)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as cause:
        if isinstance(cause, ModelError):
            raise
        raise ModelError(f"transformers cannot load {request.model.path}: {cause}") from cause
