"""Unfused adapters: exact both ways, whatever is adapted, with true GQA sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.checks import check_fits
from phi3_lora.adapters.convert import ConversionRequest, convert
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.adapters.formats.fused import fuse, part_rows, unfuse
from phi3_lora.adapters.inspection import inspect_adapter
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.errors import AdapterError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from tests.tiny import random_adapter, write_model

GROUPED = {"num_key_value_heads": 2}


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read_model_config(write_model(tmp_path / "m", **GROUPED))


def adapter_of(shapes: dict[str, tuple[int, int]], **changes: object) -> Adapter:
    settings = {"r": 3, "lora_alpha": 6.0, **changes}
    return Adapter(weights=random_adapter(shapes, r=3), num_layers=2, **settings)


def split_shapes(config: ModelConfig, *parts: str) -> dict[str, tuple[int, int]]:
    rows = part_rows(config)
    return {
        f"model.layers.{i}.{part}": (rows[part], config.hidden_size)
        for i in range(2)
        for part in parts
    }


def test_fused_to_unfused_and_back_is_the_same_adapter(config: ModelConfig) -> None:
    adapter = adapter_of(config.linear_shapes())
    split = unfuse(adapter, config)
    assert len(split.modules) == 2 * 7
    assert split.weights[lora_b_name("model.layers.0.self_attn.k_proj")].shape == (32, 3)
    back = fuse(split, config)
    assert back.r == 3 and back.scaling == adapter.scaling
    assert all(np.array_equal(back.weights[n], v) for n, v in adapter.weights.items())
    stacked = np.concatenate(
        [split.delta(f"model.layers.1.self_attn.{p}_proj") for p in ("q", "k", "v")]
    )
    assert np.array_equal(stacked, adapter.delta("model.layers.1.self_attn.qkv_proj"))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_separate_factors_are_stacked_exactly(config: ModelConfig, use_rslora: bool) -> None:
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    shapes = split_shapes(config, *parts)
    shapes["model.layers.0.self_attn.o_proj"] = (64, 64)
    adapter = adapter_of(shapes, use_rslora=use_rslora)
    fused = fuse(adapter, config)
    check_fits(fused, config.linear_shapes(), "a")
    ranks = {m.rsplit(".", 1)[-1]: fused.rank(m) for m in fused.modules}
    assert ranks == {"qkv_proj": 6, "gate_up_proj": 3, "o_proj": 3}
    qkv = fused.delta("model.layers.0.self_attn.qkv_proj")
    expected = [
        adapter.delta("model.layers.0.self_attn.q_proj"),
        np.zeros((32, 64), np.float32),
        adapter.delta("model.layers.0.self_attn.v_proj"),
    ]
    np.testing.assert_allclose(qkv, np.concatenate(expected), rtol=1e-6, atol=1e-9)
    gate_up = fused.delta("model.layers.1.mlp.gate_up_proj")
    assert not gate_up[:96].any()
    up = adapter.delta("model.layers.1.mlp.up_proj")
    np.testing.assert_allclose(gate_up[96:], up, rtol=1e-6, atol=1e-9)
    o_proj = "model.layers.0.self_attn.o_proj"
    np.testing.assert_allclose(fused.delta(o_proj), adapter.delta(o_proj), rtol=1e-6, atol=1e-9)


def test_a_size_that_nothing_tells_is_an_error(config: ModelConfig) -> None:
    adapter = adapter_of(split_shapes(config, "self_attn.q_proj", "self_attn.v_proj"))
    with pytest.raises(AdapterError, match="k_proj: not adapted, so its size is not known"):
        fuse(adapter, None)
    all_three = split_shapes(config, *(f"self_attn.{p}_proj" for p in "qkv"))
    assert fuse(adapter_of(all_three), None).r == 9
    wrong = {m: (out + 16, i) for m, (out, i) in all_three.items()}
    with pytest.raises(AdapterError, match="B has 80 rows, the base model needs 64"):
        fuse(adapter_of(wrong), config)
    mixed = all_three | {"model.layers.0.self_attn.qkv_proj": (128, 64)}
    with pytest.raises(AdapterError, match="as a whole and in parts"):
        fuse(adapter_of(mixed), config)


def test_convert_goes_both_ways_and_stock_peft_reads_the_split_names(
    config: ModelConfig, tmp_path: Path
) -> None:
    adapter = adapter_of(config.linear_shapes())
    write_adapter_folder(tmp_path / "a", adapter)
    with pytest.raises(AdapterError, match="pass --model"):
        convert(ConversionRequest(source=tmp_path / "a", target=tmp_path / "u", to="unfused"))
    found = convert(
        ConversionRequest(source=tmp_path / "a", target=tmp_path / "u", to="unfused", config=config)
    )
    assert found.lossless and found.source == "mlx+peft"
    stored = json.loads((tmp_path / "u/adapter_config.json").read_text())
    assert set(stored["target_modules"]) >= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    inspected = inspect_adapter(tmp_path / "u").to_dict()
    assert inspected["layout"] == "unfused" and "self_attn.k_proj" in inspected["target_modules"]
    assert "apart" in inspected["loads_in"]["peft"]
    back = convert(
        ConversionRequest(source=tmp_path / "u", target=tmp_path / "b", to="both", config=config)
    )
    assert back.lossless and back.source == "unfused"
    again = read_adapter(tmp_path / "b")
    assert all(np.array_equal(again.weights[n], v) for n, v in adapter.weights.items())


def test_stock_peft_on_a_llama_gives_the_same_deltas(tmp_path: Path) -> None:
    """An adapter made by stock PEFT on an unfused model is read as one of the fused model."""
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = read_model_config(write_model(tmp_path / "m", **GROUPED))
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=264,
        )
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama, lora)
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", config)
    check_fits(adapter, config.linear_shapes(), "a")
    layer = model.base_model.model.model.layers[1].self_attn
    deltas = [getattr(layer, f"{p}_proj").get_delta_weight("default") for p in "qkv"]
    expected = np.concatenate([d.detach().numpy() for d in deltas])
    found = adapter.delta("model.layers.1.self_attn.qkv_proj")
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert lora_a_name("model.layers.1.self_attn.qkv_proj") in adapter.weights
