"""Find the files of a base model, check them against config.json, and identify the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi3_lora.errors import ModelError, listing
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.quantization.folder import MLX_FILE, grid_problems, stored_shapes
from phi3_lora.storage.json_file import read_json
from phi3_lora.storage.safetensors import (
    FLOAT_TYPES,
    TensorInfo,
    is_finite,
    is_same,
    read_header,
    read_index,
)

_SAMPLE_BYTES = 64
_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "auto_map")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model folder, its parsed config.json, and the place of each tensor."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]


def read_model_files(model_dir: Path) -> ModelFiles:
    """Read config.json and the headers of the weights; no tensor is read.

    Raises:
        ModelError: when a file is missing or damaged, or config.json cannot be used.
    """
    config = read_model_config(model_dir)
    return ModelFiles(model_dir, config, tensor_index(model_dir, config))


def check_model_files(model_dir: Path, config: ModelConfig | None = None) -> ModelFiles:
    """Read a model folder, and check names, shapes and finiteness of all weights.

    Args:
        model_dir: the folder.
        config: the folder's parsed config.json; None reads it.

    Raises:
        ModelError: when config.json or a tensor cannot be used.
    """
    config = config or read_model_config(model_dir)
    return ModelFiles(model_dir, config, check_weights(model_dir, config))


def tensor_index(model_dir: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    """Read the headers of a model folder's weights, sharded or not.

    Raises:
        ModelError: when a file is missing or damaged, or the index names a missing shard.
    """
    if config.grid_bits is not None:
        return read_header(model_dir / MLX_FILE, ModelError)
    single = model_dir / "model.safetensors"
    index_path = model_dir / "model.safetensors.index.json"
    if single.exists():
        return read_header(single, ModelError)
    if not index_path.exists():
        raise ModelError(
            f"{model_dir} has no model.safetensors and no model.safetensors.index.json; "
            "weights in another format (.bin, .gguf) must be converted to safetensors first"
        )
    return read_index(index_path, ModelError)


def check_weights(model_dir: Path, config: ModelConfig) -> dict[str, TensorInfo]:
    """Check names, shapes and finiteness of all weights, and return their index.

    Packed tensors of another quantisation than the shared grids are checked by the backend that
    can unpack them.

    Raises:
        ModelError: one message that lists every missing, extra, mis-shaped or non-finite tensor.
    """
    found = tensor_index(model_dir, config)
    is_known = config.quantization is None or config.grid_bits is not None
    expected = config.tensor_shapes() if config.grid_bits is None else stored_shapes(config)
    problems = []
    if is_known:
        problems += [f"missing: {name} {expected[name]}" for name in expected if name not in found]
        problems += [
            f"wrong shape: {name} is {found[name].shape}, config.json needs {shape}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]
        # Old exports store the tied head and the rotary buffers; neither is a parameter.
        allowed = {"lm_head.weight"} if config.tie_word_embeddings else set()
        problems += [
            f"extra: {name} {info.shape}"
            for name, info in found.items()
            if name not in expected and name not in allowed and not name.endswith("inv_freq")
        ]
    if config.quantization is None:
        problems += [
            f"not a float type: {name} is {info.dtype}; allowed: F32, BF16, F16, F64"
            for name, info in found.items()
            if info.dtype not in FLOAT_TYPES
        ]
    if config.grid_bits is not None:
        problems += grid_problems(found, config)
    problems += [
        f"not finite: {name} holds NaN or infinity"
        for name, info in found.items()
        if not is_finite(info)
    ]
    problems += _framework_differences(model_dir, config, found)
    if problems:
        raise ModelError(listing(f"the weights in {model_dir} cannot be used:", problems))
    return found


def _framework_differences(
    model_dir: Path, config: ModelConfig, found: dict[str, TensorInfo]
) -> list[str]:
    problems = []
    used = {info.path.name for info in found.values()}
    stray = sorted(p.name for p in model_dir.glob("model*.safetensors") if p.name not in used)
    if stray:
        problems.append(
            f"{', '.join(stray)}: not part of the model, but mlx-lm would read it; move it away"
        )
    foreign = sorted(name for name in used if not name.startswith("model"))
    if foreign:
        problems.append(
            f"{', '.join(foreign)}: mlx-lm reads only model*.safetensors; rename it, also in the "
            "index"
        )
    if (model_dir / "adapter_config.json").exists():
        problems.append(
            "adapter_config.json: transformers would load that adapter into the base; move it and "
            "its weights to a folder of their own and pass that with --adapter"
        )
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head and embedding and not is_same(head, embedding):
        problems.append(
            "lm_head.weight: not model.embed_tokens.weight, though tie_word_embeddings is true; "
            "delete the tensor, or set tie_word_embeddings to false"
        )
    return problems


def model_identity(model_dir: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """Return a sha256 of the config, the tensors' names, types, shapes, and a sample of bytes.

    The digest does not depend on the folder's path or on how the tensors are sharded.
    """
    raw = read_json(model_dir / "config.json")
    for key in _VOLATILE_KEYS:
        raw.pop(key, None)
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        digest.update(_sample(info))
    return digest.hexdigest()


def _sample(info: TensorInfo) -> bytes:
    """Read the first, middle and last bytes of a tensor."""
    size = min(_SAMPLE_BYTES, info.num_bytes)
    middle = info.offset + (info.num_bytes - size) // 2
    last = info.offset + info.num_bytes - size
    with open(info.path, "rb") as file:
        pieces = []
        for where in (info.offset, middle, last):
            file.seek(where)
            pieces.append(file.read(size))
    return b"".join(pieces)


def num_parameters(config: ModelConfig) -> int:
    """Count the parameters of the base model."""
    return sum(int(np.prod(shape)) for shape in config.tensor_shapes().values())
