"""Names of Phi-3's modules in a GGUF file, both ways."""

from __future__ import annotations

import pytest

from phi3_lora.models.gguf_names import gguf_name, module_of_gguf_name

pytest.importorskip("gguf")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.self_attn.qkv_proj": "blk.0.attn_qkv",
    "model.layers.31.self_attn.o_proj": "blk.31.attn_output",
    "model.layers.31.post_attention_layernorm": "blk.31.ffn_norm",
    "model.layers.7.mlp.gate_up_proj": "blk.7.ffn_up",
    "model.layers.12.mlp.down_proj": "blk.12.ffn_down",
}


@pytest.mark.parametrize(("module", "name"), NAMES.items())
def test_names_of_phi3_are_llama_cpps_both_ways(module: str, name: str) -> None:
    assert gguf_name(module) == name
    assert module_of_gguf_name(name) == module


@pytest.mark.parametrize("name", ["attn_qkv", "blk.0.token_embd", "blk.x.attn_qkv", "rope_freqs"])
def test_a_foreign_name_has_no_module(name: str) -> None:
    assert module_of_gguf_name(name) is None


def test_a_foreign_module_has_no_name() -> None:
    with pytest.raises(KeyError):
        gguf_name("model.layers.0.self_attn.q_proj")
