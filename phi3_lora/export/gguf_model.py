"""Writer of models as GGUF files for llama.cpp and Ollama.

Source: llama.cpp, convert_hf_to_gguf.py (Phi3MiniModel) for keys and names, src/models/phi3.cpp
for what is read. The gguf package writes the file format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.errors import ModelError
from phi3_lora.export.gguf_tensors import (
    OUT_TYPES,
    Q8_0_VALUES,
    PlannedTensor,
    storage_type,
    write_tensors,
)
from phi3_lora.export.gguf_tokenizer import GgufVocabulary, read_vocabulary
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.gguf_names import gguf_name
from phi3_lora.storage.atomic import replacing
from phi3_lora.storage.optional import gguf_package
from phi3_lora.storage.safetensors import (
    FLOAT_TYPES,
    NewTensor,
    TensorInfo,
    read_raw,
)

_CONTEXT_STEP = 256


def write_gguf(
    path: Path,
    model_dir: Path,
    config: ModelConfig,
    tensors: Mapping[str, NewTensor],
    *,
    out_type: str,
) -> list[str]:
    """Write a model as one file; an older file is replaced when the new file is complete.

    Args:
        path: the file to write.
        model_dir: model folder with the tokenizer and chat template.
        config: configuration of the model.
        tensors: tensors by the names of ModelConfig.tensor_shapes; matrices in the type of the
            file are copied, all others are rounded once.
        out_type: one of OUT_TYPES.

    Returns:
        Differences between llama.cpp and this model, one sentence each.

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
        write_tensors(part, plan, writer.data_alignment)
    return [*vocabulary.notes, *_notes(config, plan, out_type)]


def unchanged_as_stored(
    tensors: Mapping[str, NewTensor], base: Mapping[str, TensorInfo], changed: Collection[str]
) -> dict[str, NewTensor]:
    """Take the float tensors that a merge does not change straight from the base.

    Each is then rounded once, a block at a time. No copy of an embedding is held in memory, and
    vectors keep the base's precision.

    Args:
        tensors: tensors for write_gguf.
        base: tensors of the base model, by the same names.
        changed: paths of the modules that the merge changes.
    """
    found = dict(tensors)
    for name, info in base.items():
        is_own = name in found and info.dtype in FLOAT_TYPES and info.shape == found[name].shape
        if is_own and name.removesuffix(".weight") not in changed:
            found[name] = NewTensor(info.dtype, info.shape, partial(read_raw, info))
    return found


def check_gguf(model_dir: Path, config: ModelConfig) -> GgufVocabulary:
    """Check that llama.cpp can run a model before any weight is read; return its vocabulary.

    Raises:
        ModelError: when llama.cpp cannot run the model.
    """
    width = config.num_attention_heads * config.head_dim
    if width != config.hidden_size:
        raise ModelError(
            f"llama.cpp wants heads * head_dim = hidden_size; {model_dir} has {width} and "
            f"{config.hidden_size}: merge --to hf instead"
        )
    return read_vocabulary(model_dir, config)


def context_for(config: ModelConfig) -> int:
    """Choose the number of context tokens to run with.

    llama.cpp rounds the number up to a multiple of 256. Above LongRoPE's boundary it uses the
    long factors for every text.
    """
    limit = min(config.max_position_embeddings, config.original_max_position_embeddings)
    return limit // _CONTEXT_STEP * _CONTEXT_STEP or limit


def _plan(config: ModelConfig, tensors: Mapping[str, NewTensor], ggml: str) -> list[PlannedTensor]:
    plan = [
        PlannedTensor(
            f"{gguf_name(name.removesuffix('.weight'))}.weight",
            storage_type(tensor.shape, ggml),
            tensor,
        )
        for name, tensor in tensors.items()
    ]
    for name in ("long", "short"):
        factors = getattr(config.rope, f"{name}_factor")
        if factors is not None:
            value = np.asarray(factors, np.float32)
            tensor = NewTensor("F32", value.shape, lambda value=value: value)  # type: ignore[misc]
            plan.append(PlannedTensor(f"rope_factors_{name}.weight", "F32", tensor))
    return plan


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
    # Older llama.cpp invents a window if the key is missing; 0 means no window.
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
        # llama.cpp needs the key, and the package skips an empty list; this pair merges nothing.
        writer.add_token_merges(vocabulary.merges or [" "])
    for kind, i in vocabulary.special_ids.items():
        getattr(writer, f"add_{kind}_token_id")(i)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_chat_template(vocabulary.chat_template)


def _write_header(writer: Any, gguf: Any, plan: list[PlannedTensor]) -> None:
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


def _notes(config: ModelConfig, plan: list[PlannedTensor], out_type: str) -> list[str]:
    notes = []
    if config.rope.long_factor is not None:
        limit = context_for(config)
        notes.append(
            f"llama.cpp chooses LongRoPE's factors by -c, not by the text's length: run with -c "
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
        notes.append(f"{short} matrices are F16: their rows are no multiple of {Q8_0_VALUES}")
    return notes
