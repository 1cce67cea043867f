"""A model as one GGUF file for llama.cpp and Ollama, made and written a block of rows at a time.

Source: llama.cpp, convert_hf_to_gguf.py (Phi3MiniModel) for keys and names, src/models/phi3.cpp
for what is read; the GGUF format itself is the gguf package's.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_lora.arrays import Float32
from phi3_lora.errors import ModelError
from phi3_lora.export.gguf_tokenizer import GgufVocabulary, read_vocabulary
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.atomic import replacing
from phi3_lora.storage.optional import gguf_package
from phi3_lora.storage.safetensors import (
    FLOAT_TYPES,
    NewTensor,
    TensorInfo,
    from_float32,
    read_raw,
    to_float32,
)

_BLOCK_ELEMENTS = 1 << 22
_Q8_0_VALUES = 32
"""Weights of a row that share a scale."""
_Q8_0_BYTES = 34
_CONTEXT_STEP = 256
_LARGEST_Q8_0 = 127 * float(np.finfo(np.float16).max)


class OutType(NamedTuple):
    """How a file stores its matrices; vectors are always float32."""

    stored_as: str
    """The float type of safetensors to give the tensors in."""
    ggml: str
    file_type: str
    """llama.cpp's name of such a file."""


OUT_TYPES = {
    "f32": OutType("F32", "F32", "ALL_F32"),
    "f16": OutType("F16", "F16", "MOSTLY_F16"),
    "bf16": OutType("BF16", "BF16", "MOSTLY_BF16"),
    "q8_0": OutType("F32", "Q8_0", "MOSTLY_Q8_0"),
}
OUT_TYPE_OF = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""A dtype of a model -> the output type that holds it."""
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class _Planned(NamedTuple):
    name: str
    kind: str
    """F32, F16, BF16 or Q8_0."""
    tensor: NewTensor

    @property
    def num_bytes(self) -> int:
        count = math.prod(self.tensor.shape)
        if self.kind == "Q8_0":
            return count // _Q8_0_VALUES * _Q8_0_BYTES
        return count * (4 if self.kind == "F32" else 2)


def write_gguf(
    path: Path,
    model_dir: Path,
    config: ModelConfig,
    tensors: Mapping[str, NewTensor],
    *,
    out_type: str,
) -> list[str]:
    """Write a model as one file; an older file of that name is replaced when the new one is whole.

    Args:
        path: the file.
        model_dir: whose tokenizer and chat template go into the file.
        config: of the model.
        tensors: by the names of ModelConfig.tensor_shapes; matrices in the type of the file
            are written as they are, all others are rounded once.
        out_type: one of OUT_TYPES.

    Returns:
        What llama.cpp does otherwise than this model, one sentence each.

    Raises:
        ModelError: when gguf is not installed, llama.cpp cannot hold the model or its tokenizer,
            or a weight is too large for out_type.
        StorageError: when the disk is full; nothing is left behind.
    """
    gguf = gguf_package(ModelError)
    vocabulary = check_gguf(model_dir, config)
    plan = _plan(config, tensors, OUT_TYPES[out_type].ggml)
    with replacing(path) as part:
        writer = gguf.GGUFWriter(part, "phi3")
        with contextlib.closing(writer):
            _add_model(writer, gguf, config, out_type)
            _add_vocabulary(writer, vocabulary)
            _write_header(writer, gguf, plan)
        _write_tensors(part, plan, writer.data_alignment)
    return [*vocabulary.notes, *_notes(config, plan, out_type)]


def unchanged_as_stored(
    tensors: Mapping[str, NewTensor], base: Mapping[str, TensorInfo], changed: Collection[str]
) -> dict[str, NewTensor]:
    """Tensors of a merge, those of float types that it does not change straight from the base.

    They are then rounded once, a block at a time: no copy of an embedding is held, and vectors
    keep the base's own precision.

    Args:
        tensors: for write_gguf.
        base: the base's own, by the same names.
        changed: paths of the modules that the merge changes.
    """
    found = dict(tensors)
    for name, info in base.items():
        is_own = name in found and info.dtype in FLOAT_TYPES and info.shape == found[name].shape
        if is_own and name.removesuffix(".weight") not in changed:
            found[name] = NewTensor(info.dtype, info.shape, partial(read_raw, info))
    return found


def check_gguf(model_dir: Path, config: ModelConfig) -> GgufVocabulary:
    """The model's vocabulary, after asking, before any weight is read, if llama.cpp can run it.

    Raises:
        ModelError: when it cannot.
    """
    width = config.num_attention_heads * config.head_dim
    if width != config.hidden_size:
        raise ModelError(
            f"llama.cpp wants heads * head_dim = hidden_size; {model_dir} has {width} and "
            f"{config.hidden_size}: merge --to hf instead"
        )
    return read_vocabulary(model_dir, config)


def context_for(config: ModelConfig) -> int:
    """Tokens of context to run with.

    llama.cpp rounds it up to a multiple of 256 and, where it is then above LongRoPE's boundary,
    takes the long factors for every text.
    """
    limit = min(config.max_position_embeddings, config.original_max_position_embeddings)
    return limit // _CONTEXT_STEP * _CONTEXT_STEP or limit


def as_q8_0(value: Float32) -> Float32:
    """What a reader of a q8_0 file gets for rows of a matrix; a merge measures itself by it.

    To write such values again changes nothing more.

    Raises:
        ModelError: when a number is too large.
    """
    kind = _kind(value.shape, "Q8_0")
    if kind != "Q8_0":
        return to_float32(_stored(value, kind, "a matrix"), kind)
    gguf = gguf_package(ModelError)
    packed = _quantized(value, "a matrix")
    return np.asarray(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0), np.float32)


def _plan(config: ModelConfig, tensors: Mapping[str, NewTensor], ggml: str) -> list[_Planned]:
    plan = [
        _Planned(_gguf_name(name), _kind(tensor.shape, ggml), tensor)
        for name, tensor in tensors.items()
    ]
    for name in ("long", "short"):
        factors = getattr(config.rope, f"{name}_factor")
        if factors is not None:
            value = np.asarray(factors, np.float32)
            tensor = NewTensor("F32", value.shape, lambda value=value: value)  # type: ignore[misc]
            plan.append(_Planned(f"rope_factors_{name}.weight", "F32", tensor))
    return plan


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    if name in _NAMES:
        return _NAMES[name]
    layer, _, module = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[module]}.weight"


def _kind(shape: tuple[int, ...], ggml: str) -> str:
    if len(shape) == 1:
        return "F32"
    # As llama.cpp's converter does with rows that no whole number of scales covers.
    return "F16" if ggml == "Q8_0" and shape[-1] % _Q8_0_VALUES else ggml


def _add_model(writer: Any, gguf: Any, config: ModelConfig, out_type: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[OUT_TYPES[out_type].file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope.theta)
    # Older llama.cpp makes up a window where the key is missing; 0 is none.
    writer.add_sliding_window(config.sliding_window or 0)
    if config.rope.long_factor is not None:
        writer.add_rope_scaling_attn_factors(config.attention_factor)


def _add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_name(vocabulary.model_name)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
    else:
        # llama.cpp wants the key, the package writes no empty list; this pair merges nothing.
        writer.add_token_merges(vocabulary.merges or [" "])
    for kind, i in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(i)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_chat_template(vocabulary.chat_template)


def _write_header(writer: Any, gguf: Any, plan: list[_Planned]) -> None:
    for planned in plan:
        writer.add_tensor_info(
            planned.name,
            planned.tensor.shape,
            np.dtype(np.float32),
            planned.num_bytes,
            raw_dtype=gguf.GGMLQuantizationType[planned.kind],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _write_tensors(part: Path, plan: list[_Planned], alignment: int) -> None:
    """Append the tensors to a header; the package's own way wants each tensor whole in memory."""
    with open(part, "ab") as file:
        file.write(bytes(-file.tell() % alignment))
        for planned in plan:
            _write_tensor(file, planned)
            file.write(bytes(-planned.num_bytes % alignment))
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, planned: _Planned) -> None:
    # A function of its own, so that no view of a tensor is left when the next one is made.
    for block in _blocks(planned):
        file.write(np.ascontiguousarray(block).data)


def _blocks(planned: _Planned) -> Iterator[NDArray[Any]]:
    """A tensor as the file holds it, some rows at a time."""
    name, kind, tensor = planned
    value = tensor.make()
    assert value.shape == tensor.shape, name
    rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(tensor.shape[1:])))
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        yield part if kind == tensor.dtype else _stored(to_float32(part, tensor.dtype), kind, name)


def _stored(value: Float32, kind: str, name: str) -> NDArray[Any]:
    if kind == "Q8_0":
        return _quantized(value, name)
    with np.errstate(over="ignore"):
        stored = from_float32(value, kind)
    if not np.isfinite(to_float32(stored, kind)).all():
        raise _too_large(name, kind)
    return stored


def _quantized(value: Float32, name: str) -> NDArray[Any]:
    gguf = gguf_package(ModelError)
    if not np.abs(value).max(initial=0.0) <= _LARGEST_Q8_0:
        raise _too_large(name, "Q8_0")
    # 1 / a scale of nearly 0 is infinite; the scale itself is then stored as 0.
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0))


def _too_large(name: str, kind: str) -> ModelError:
    return ModelError(f"{name} has a number that {kind} does not hold: use --outtype bf16 or f32")


def _notes(config: ModelConfig, plan: list[_Planned], out_type: str) -> list[str]:
    notes = []
    if config.rope.long_factor is not None:
        limit = context_for(config)
        notes.append(
            f"llama.cpp takes LongRoPE's factors by its context, not by the text: run with -c "
            f"{limit} for texts of up to {limit:,} tokens, with more only for longer ones"
        )
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        notes.append(
            f"llama.cpp leaves out this model's attention window: texts of over {window:,} tokens "
            "are read otherwise"
        )
    short = sum(p.kind == "F16" for p in plan) if out_type == "q8_0" else 0
    if short:
        notes.append(f"{short} matrices are F16: their rows are no multiple of {_Q8_0_VALUES}")
    return notes
