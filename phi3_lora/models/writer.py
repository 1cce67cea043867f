"""Write a model folder that follows another one: companion files, config and sharded weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import in_both_styles
from phi3_lora.storage.json_file import read_json
from phi3_lora.storage.safetensors import ITEM_BYTES, NewTensor, write_streamed

INDEX_NAME = "model.safetensors.index.json"
_COMPANIONS = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*")
_NOT_COMPANIONS = ("config.json", INDEX_NAME, "adapter_config.json")
_SHARD_BYTES = 5 * 10**9


def write_companions(
    source: Path, config: ModelConfig, folder: Path, changes: Mapping[str, Any]
) -> None:
    """Copy tokenizer, template and generation settings, and write config.json.

    Args:
        source: the folder to copy from.
        config: the parsed config.json of source.
        folder: the folder to write to.
        changes: new values for config.json; None deletes a key.
    """
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.name not in _NOT_COMPANIONS:
                shutil.copyfile(path, folder / path.name)
    raw = {**in_both_styles(read_json(source / "config.json"), config), **changes}
    raw = {key: value for key, value in raw.items() if key not in changes or value is not None}
    text = json.dumps(raw, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_shards(
    folder: Path, tensors: Mapping[str, NewTensor], shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards and their index.

    Args:
        folder: the folder to write to.
        tensors: the tensors by name.
        shard_bytes: most bytes in a shard; a larger tensor is a shard alone.
    """
    shards: list[dict[str, NewTensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        write_streamed(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_streamed(folder / file_name, shard)
        weight_map.update(dict.fromkeys(shard, file_name))
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index that gives transformers the file of each tensor."""
    text = json.dumps({"metadata": {}, "weight_map": dict(weight_map)}, indent=2)
    (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")
