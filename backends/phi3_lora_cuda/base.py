"""Load transformers' Phi-3; the weights are streamed onto the device."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator, Mapping

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
    """Enter a context in which transformers shows no warnings and no progress bars.

    The warnings (generation flags, unused buffers) mean nothing to our users. The old settings
    return at the end, for other models in the process.
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


def load_base(
    request: LoadRequest, dtype: torch.dtype, device: torch.device
) -> transformers.PreTrainedModel:
    """Load Phi3ForCausalLM from a folder; code that its auto_map names is never run.

    Raises:
        ModelError: when the folder's weights are quantised, but not on a shared grid; or when nf4
            is requested and bitsandbytes is missing.
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


def _empty_model(request: LoadRequest, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Make the model on the meta device: its weights have no memory yet."""
    config = transformers.Phi3Config.from_pretrained(
        request.model.path,
        # Only the adapter has dropout, and rows are never padded.
        resid_pdrop=0.0,
        attention_dropout=0.0,
        embd_pdrop=0.0,
        pad_token_id=None,
        local_files_only=True,
    )
    if hasattr(config, "quantization_config"):
        # This module reads the quantised words; transformers' quantisers must not.
        del config.quantization_config
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )


def _stream_weights(
    model: transformers.PreTrainedModel,
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Load the weights into a model on the meta device, one tensor at a time."""
    wanted = model.state_dict().keys()
    # Old exports also store the tied head and rotary buffers. A grid's biases follow from its
    # scales. All of these are skipped.
    for name in wanted & tensors.keys():
        value = _to_torch(tensors[name], dtype, device)
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, Nf4Linear):
            layer.quantize(value)
        else:
            model.load_state_dict({name: value}, strict=False, assign=True)
    model.tie_weights()
    left = [n for n, p in model.named_parameters() if p.is_meta]
    assert not left, f"the weights were checked, but these are missing: {left}"


def _to_torch(info: TensorInfo, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Read a stored tensor onto a device; floats get the given dtype, quantised words int32."""
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
