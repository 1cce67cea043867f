from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.errors import ModelError
from phi3_lora.models.config_json import read_model_config
from tests.tiny import tiny_config

HALF = 8  # entries of a rope factor list: head dimension 16


def write_config(folder: Path, raw: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = raw if isinstance(raw, str) else json.dumps(raw)
    (folder / "config.json").write_text(text)
    return folder


def longrope(**changes: Any) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * HALF, "long_factor": [2.0] * HALF}
    return {"type": "longrope", **factors, **changes}


def without(name: str) -> dict[str, Any]:
    raw = tiny_config()
    del raw[name]
    return raw


@pytest.mark.parametrize(
    ("raw", "phrase"),
    [
        ("{", "is not readable JSON"),
        ("<!DOCTYPE html>", "is not readable JSON"),
        ("", "is not readable JSON"),
        ([], "must hold a JSON object, got list"),
        (tiny_config(model_type="llama"), "is not a Phi-3 architecture"),
        (tiny_config(architectures=["LlamaForCausalLM"]), "is not a Phi-3 architecture"),
        (tiny_config(_attn_implementation_internal="x/y"), "_attn_implementation_internal"),
        (tiny_config(model_file="x.py"), "model_file"),
        (tiny_config(attention_bias=True), "sets attention_bias"),
        (without("hidden_size"), "lacks 'hidden_size'"),
        (without("num_attention_heads"), "lacks 'num_attention_heads'"),
        (tiny_config(num_hidden_layers=0), "num_hidden_layers must be >= 1, got 0"),
        (tiny_config(vocab_size=-1), "vocab_size must be >= 1, got -1"),
        (tiny_config(num_attention_heads=0, num_key_value_heads=0), "num_attention_heads must be"),
        (tiny_config(num_attention_heads=5, num_key_value_heads=5), "is not divisible by"),
        (tiny_config(num_key_value_heads=3), "num_key_value_heads 3"),
        (tiny_config(dtype="int4"), "dtype 'int4' is not one of"),
        (tiny_config(pad_token_id=264), "pad_token_id 264 is outside the vocabulary of 264"),
        (tiny_config(hidden_act="gelu"), "hidden_act 'gelu' is not silu"),
        (tiny_config(hidden_size=None), "value of the wrong type"),
        (tiny_config(rope_scaling=longrope(long_factor=[1.0] * 7)), "rope long_factor has 7"),
        (tiny_config(rope_scaling=longrope(short_factor=[])), "rope short_factor has 0"),
        (tiny_config(rope_scaling={"type": "longrope"}), "lacks 'short_factor'"),
    ],
)
def test_bad_config_is_a_model_error(tmp_path: Path, raw: Any, phrase: str) -> None:
    with pytest.raises(ModelError) as problem:
        read_model_config(write_config(tmp_path, raw))
    assert phrase in str(problem.value) and str(tmp_path) in str(problem.value)


def test_missing_config_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_model_config(tmp_path)


def test_contradictions_are_listed_at_once(tmp_path: Path) -> None:
    raw = tiny_config(num_key_value_heads=3, dtype="int4", pad_token_id=999)
    with pytest.raises(ModelError) as problem:
        read_model_config(write_config(tmp_path, raw))
    assert len(str(problem.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"eos_token_id": [256, 999]}, "eos_token_id 999 is outside"),
        ({"sliding_window": 0}, "sliding_window must be null or an integer >= 1, got 0"),
        ({"sliding_window": -5}, "sliding_window"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor must be in"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor must be in"),
        ({"partial_rotary_factor": 0.2}, "even number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number > 0"),
        ({"rope_theta": 0}, "rope_theta must be"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_value_out_of_range_is_named(tmp_path: Path, changes: dict, phrase: str) -> None:
    with pytest.raises(ModelError, match=re.escape(phrase)):
        read_model_config(write_config(tmp_path, tiny_config(**changes)))


def test_remote_code_entry_is_ignored(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (tmp_path / "modeling_phi3.py").write_text("raise SystemExit")
    found = read_model_config(write_config(tmp_path, tiny_config(auto_map=auto_map)))
    assert found == read_model_config(write_config(tmp_path, tiny_config()))


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_both_rope_styles_are_equal(tmp_path: Path, kind: str) -> None:
    old = tiny_config(
        rope_scaling=longrope(type=kind),
        rope_theta=5e4,
        partial_rotary_factor=1.0,
        original_max_position_embeddings=128,
    )
    new = tiny_config(
        rope_parameters={
            **longrope(),
            "rope_type": "longrope",
            "rope_theta": 5e4,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 128,
        }
    )
    for name in ("rope_theta", "rope_scaling", "original_max_position_embeddings"):
        del new[name]
    first = read_model_config(write_config(tmp_path / "old", old))
    assert first == read_model_config(write_config(tmp_path / "new", new))
    assert first.rope.theta == 5e4 and first.original_max_position_embeddings == 128
    assert first.attention_factor == pytest.approx((1 + 2 / 7) ** 0.5, rel=1e-12)
    assert first.uses_long_factors([128, 129]).tolist() == [False, True]


def test_partial_rotary_factor_sets_the_rotary_dimension(tmp_path: Path) -> None:
    raw = tiny_config(partial_rotary_factor=0.75, rope_scaling=longrope(short_factor=[1.0] * 6))
    raw["rope_scaling"]["long_factor"] = [1.0] * 6
    assert read_model_config(write_config(tmp_path, raw)).rotary_dim == 12


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_of_either_style(tmp_path: Path, name: str) -> None:
    raw = tiny_config()
    del raw["dtype"], raw["torch_dtype"]
    found = read_model_config(write_config(tmp_path, {**raw, name: "torch.bfloat16"}))
    assert found.dtype == "bfloat16"


def test_stop_ids_join_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, 256]}))
    found = read_model_config(write_config(tmp_path, tiny_config()))
    assert found.stop_ids == frozenset({256, 259})


def test_linear_shapes_with_grouped_queries(tmp_path: Path) -> None:
    found = read_model_config(write_config(tmp_path, tiny_config(num_key_value_heads=2)))
    shapes = found.linear_shapes()
    assert len(shapes) == 8
    assert shapes["model.layers.0.self_attn.qkv_proj"] == (64 + 2 * 2 * 16, 64)
    assert shapes["model.layers.1.mlp.gate_up_proj"] == (192, 64)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 96)


@pytest.mark.parametrize(("tied", "has_head"), [(True, False), (False, True)])
def test_tied_head_has_no_tensor(tmp_path: Path, tied: bool, has_head: bool) -> None:
    found = read_model_config(write_config(tmp_path, tiny_config(tie_word_embeddings=tied)))
    assert ("lm_head.weight" in found.tensor_shapes()) == has_head


def test_longrope_factor_wins_over_the_ratio_of_contexts(tmp_path: Path) -> None:
    """transformers computes the ratio only if config.json has no factor."""
    raw = tiny_config(
        rope_scaling={**longrope(type="longrope"), "factor": 32.0},
        max_position_embeddings=8192,
        original_max_position_embeddings=4096,
    )
    found = read_model_config(write_config(tmp_path, raw)).attention_factor
    assert found == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)


def test_rows_of_q_k_and_v_follow_their_heads(tmp_path: Path) -> None:
    found = read_model_config(write_config(tmp_path, tiny_config(num_key_value_heads=2)))
    q, kv = found.num_attention_heads * found.head_dim, 2 * found.head_dim
    assert found.qkv_rows == (q, kv, kv)
    assert found.linear_shapes()["model.layers.0.self_attn.qkv_proj"][0] == q + 2 * kv


def test_the_end_of_turn_comes_first_among_the_stop_ids(tmp_path: Path) -> None:
    raw = tiny_config(eos_token_id=[9, 3, 7])
    found = read_model_config(write_config(tmp_path, raw))
    assert found.answer_stop_ids(None) == (3, 7, 9)
    assert found.answer_stop_ids(7) == (7, 3, 9)
    assert found.answer_stop_ids(5) == (5, 3, 7, 9)
