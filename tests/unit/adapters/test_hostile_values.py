"""Values that no tool writes; each gives a clear error message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.config.load import load_settings
from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.errors import AdapterError, ConfigError, ModelError
from phi3_lora.models.config_json import read_model_config
from tests.tiny import random_adapter, tiny_config, write_model

SHAPES = {"model.layers.0.self_attn.o_proj": (4, 4)}


@pytest.mark.parametrize(
    "assignment",
    [
        "peft_config.r=.inf",
        "training_config.max_steps=.inf",
        "training_config.num_train_epochs=.inf",
    ],
)
def test_infinite_settings_are_refused(assignment: str) -> None:
    base = {"model": "demo", "data": "demo", "output_dir": "x"}
    with pytest.raises(ConfigError):
        load_settings(base=base, assignments=[assignment])


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "abc"}, {"rope_scaling": "x"}, {"rms_norm_eps": "x"}, {"architectures": 5}],
)
def test_mistyped_model_config_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**change)))
    with pytest.raises(ModelError):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    "change", [{"lora_dropout": "x"}, {"lora_alpha": float("nan")}, {"lora_alpha": -4}]
)
def test_mistyped_adapter_config_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "a"
    adapter = Adapter(weights=random_adapter(SHAPES, r=2), r=2, lora_alpha=4.0)
    write_adapter_folder(folder, adapter, to="peft")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError):
        read_adapter(folder)


def test_crafted_tensor_shape_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}
    header = json.dumps({"base_model.model.x.lora_A.weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(16)
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match="whole numbers"):
        read_adapter(tmp_path)


def test_separators_that_only_python_calls_white_space_are_kept(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(write_model(tmp_path), vocab_size=264)
    messages = (
        {"role": "user", "content": " q <|end|> "},
        {"role": "assistant", "content": "\x1cfs"},
    )
    document = tokenizer.encode_conversations([Conversation(messages, "a:1")])[0]
    learnt = tokenizer.decode(
        document.tokens[document.supervised].tolist(), skip_special_tokens=False
    )
    assert learnt == "\x1cfs<|end|>"
