"""Adapters of stock PEFT with a rank and alpha for each module, and with shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.checks import check_fits
from phi3_lora.adapters.deltas import relative_difference
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.errors import AdapterError
from phi3_lora.models.config_json import read_model_config
from phi3_lora.storage.safetensors import encode, read_all_float32
from tests.tiny import write_model

peft = pytest.importorskip("peft")
PATTERNS = {
    "rank_pattern": {"o_proj": 2, r"model\.layers\.1\.mlp\.down_proj": 7},
    "alpha_pattern": {"o_proj": 10, "mlp.gate_up_proj": 3},
}


def made_by_peft(tmp_path: Path, **changes: object):
    from transformers import Phi3ForCausalLM

    folder = write_model(tmp_path / "m")
    base = Phi3ForCausalLM.from_pretrained(folder)
    settings = {"r": 4, "lora_alpha": 8, **PATTERNS, **changes}
    config = peft.LoraConfig(
        target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **settings,
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "a")
    return folder, model


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_deltas_are_pefts(tmp_path: Path, use_rslora: bool) -> None:
    folder, model = made_by_peft(tmp_path, use_rslora=use_rslora)
    adapter = read_adapter(tmp_path / "a")
    check_fits(adapter, read_model_config(folder).linear_shapes(), "a")
    assert adapter.r == 4 and {adapter.rank(m) for m in adapter.modules} == {2, 4, 7}
    assert adapter.use_rslora == use_rslora
    for module in adapter.modules:
        layer = model.base_model.model.get_submodule(module)
        expected = layer.get_delta_weight("default").detach().numpy()
        gap = np.linalg.norm(adapter.delta(module) - expected) / np.linalg.norm(expected)
        assert gap <= 1e-6, module
    # mlx-lm and servers support only one rank and one scale.
    assert write_adapter_folder(tmp_path / "b", adapter, to="mlx") == []
    plain = read_adapter(tmp_path / "b")
    assert plain.is_uniform and plain.r == 7
    assert max(relative_difference(adapter, plain).values()) <= 1e-7
    # PEFT's file keeps the patterns.
    assert write_adapter_folder(tmp_path / "c", adapter) == []
    again = peft.PeftModel.from_pretrained(model.unload(), tmp_path / "c")
    for module in adapter.modules:
        found = again.base_model.model.get_submodule(module).get_delta_weight("default")
        expected = adapter.delta(module)
        gap = np.linalg.norm(found.detach().numpy() - expected) / np.linalg.norm(expected)
        assert gap <= 1e-6, module


def test_a_pattern_that_lies_is_an_error(tmp_path: Path) -> None:
    made_by_peft(tmp_path)
    path = tmp_path / "a/adapter_config.json"
    for pattern, phrase in (
        ({"o_proj": 3}, "does not hold rank 3, which adapter_config.json says"),
        ({"(": 3}, "not a regular expression"),
        ({"o_proj": "x"}, "must map names to whole numbers"),
        (["o_proj"], "must map names to whole numbers"),
    ):
        config = json.loads(path.read_text()) | {"rank_pattern": pattern}
        path.write_text(json.dumps(config))
        with pytest.raises(AdapterError, match=phrase):
            read_adapter(tmp_path / "a")


def test_shards_are_read_whole(tmp_path: Path) -> None:
    made_by_peft(tmp_path, rank_pattern={}, alpha_pattern={})
    whole = read_adapter(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = read_all_float32(path, AdapterError)
    path.unlink()
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:]), 1):
        file_name = f"adapter_model-0000{i}-of-00002.safetensors"
        (tmp_path / "a" / file_name).write_bytes(encode({n: tensors[n] for n in part}))
        weight_map |= dict.fromkeys(part, file_name)
    index = tmp_path / "a/adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    found = read_adapter(tmp_path / "a")
    assert found.weights.keys() == whole.weights.keys()
    assert all(np.array_equal(found.weights[n], v) for n, v in whole.weights.items())
    (tmp_path / "a/adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(AdapterError, match="00002-of-00002"):
        read_adapter(tmp_path / "a")
