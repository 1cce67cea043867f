"""transformers' Phi-3 with a folder's weights, streamed onto the device."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers

from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ModelError
from phi3_lora.storage.safetensors import TensorInfo, read_parts
from phi3_lora_cuda.documents import ATTENTION_NAME
from phi3_lora_cuda.quantized import Nf4Linear, use_stored


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without transformers' notes (generation flags, unused buffers) and progress bars.

    They are not for our users. Other code in the process hears of its own models as before.
    """
    log = logging.getLogger("transformers")
    level, has_bar = log.level, transformers.utils.logging.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        if has_bar:
            transformers.utils.logging.enable_progress_bar()


def load_base(request: LoadRequest, dtype: torch.dtype, device: torch.device) -> Any:
    """Phi3ForCausalLM by name: the folder's auto_map is never followed.

    Raises:
        ModelError: when the folder holds weights that are quantised otherwise than on a shared
            grid, or nf4 is asked for and bitsandbytes is missing.
    """
    config = request.model.config
    if config.quantization is not None and config.grid_bits is None:
        raise ModelError(
            f"{request.model.path} holds quantised weights, which --backend cuda does not read; "
            "use the unquantised model with --quantize, or --backend mlx for a folder that mlx-lm "
            "quantised"
        )
    if request.quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("--quantize nf4 needs bitsandbytes: pip install 'phi3-lora[nf4]'")
    with quiet_transformers():
        model = _empty_model(request, dtype)
    if config.grid_bits is not None:
        use_stored(model, list(config.grid_shapes()), bits=config.grid_bits)
    elif request.quantize == "nf4":
        use_stored(model, list(config.linear_shapes()), bits=None)
    _stream_weights(model, request.model.tensors, dtype, device)
    return model


def _empty_model(request: LoadRequest, dtype: torch.dtype) -> Any:
    """The model without memory for its weights."""
    config = transformers.Phi3Config.from_pretrained(
        request.model.path,
        # Dropout is the adapter's alone, and rows are never padded.
        resid_pdrop=0.0,
        attention_dropout=0.0,
        embd_pdrop=0.0,
        pad_token_id=None,
        local_files_only=True,
    )
    if hasattr(config, "quantization_config"):
        # The words are read here, not by transformers' own quantisers.
        del config.quantization_config
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )


def _stream_weights(
    model: Any, tensors: Mapping[str, TensorInfo], dtype: torch.dtype, device: torch.device
) -> None:
    """Give a model on the meta device its weights, one tensor at a time."""
    wanted = model.state_dict().keys()
    # Old exports also store the tied head and rotary buffers; a grid's biases say nothing new.
    for name in wanted & tensors.keys():
        value = _to_torch(tensors[name], dtype, device)
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Nf4Linear):
            layer.quantize(value)
        else:
            model.load_state_dict({name: value}, strict=False, assign=True)
    model.tie_weights()
    left = [n for n, p in model.named_parameters() if p.is_meta]
    assert not left, f"weights were checked, and yet these are missing: {left}"


def _to_torch(info: TensorInfo, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A stored tensor on a device; floats in the given dtype, words as they are."""
    is_words = info.dtype == "U32"
    kind = torch.int32 if is_words else dtype
    out = torch.empty(math.prod(info.shape), dtype=kind, device=device)
    start = 0
    for part in read_parts(info):
        value = torch.from_numpy(part.view(np.int32) if is_words else part)
        value = value.view(torch.bfloat16) if info.dtype == "BF16" else value
        out[start : start + len(part)].copy_(value)
        start += len(part)
    return out.view(info.shape)
