"""The command convert: rules of each tool, verification and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.deltas import relative_difference
from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
from phi3_lora.adapters.names import lora_a_name, magnitude_name
from phi3_lora.models.config_json import read_model_config
from tests.cli.test_contract import Capture, run, run_json
from tests.tiny import random_adapter, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", num_key_value_heads=2)


def adapter_for(model: Path, seed: int = 1, **changes: object) -> Adapter:
    config = read_model_config(model)
    weights = random_adapter(config.linear_shapes(), r=4, seed=seed)
    settings = {"r": 4, "lora_alpha": 6.0, "use_rslora": True, "num_layers": 2, **changes}
    return Adapter(weights=weights, **settings)


def with_patterns(adapter: Adapter) -> Adapter:
    """Return the adapter with one module of rank 2 and another module of alpha 3."""
    small, other = adapter.modules[1], adapter.modules[2]
    a, b = adapter.pair(small)
    weights = {
        **adapter.weights,
        lora_a_name(small): np.ascontiguousarray(a[:2]),
        lora_a_name(small).replace("lora_A", "lora_B"): np.ascontiguousarray(b[:, :2]),
    }
    return dataclasses.replace(adapter, weights=weights, alphas={other: 3.0})


def with_magnitudes(adapter: Adapter) -> Adapter:
    new = {
        magnitude_name(m): np.full(len(adapter.pair(m)[1]), 1.5, np.float32)
        for m in adapter.modules
    }
    return dataclasses.replace(adapter, weights={**adapter.weights, **new})


def test_vllm_gets_one_rank_and_scale_and_the_flag_to_start_it_with(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    adapter = with_patterns(adapter_for(model))
    write_adapter_folder(tmp_path / "a", adapter)
    code, out, err = run(
        capsys, "convert", tmp_path / "a", tmp_path / "v", "--for", "vllm", "--verify"
    )
    assert code == 0 and "verified: the same adapter" in out
    assert "--max-lora-rank 8 (this rank is 4)" in err and "padded to rank 4" in err
    raw = json.loads((tmp_path / "v/adapter_config.json").read_text())
    assert raw["rank_pattern"] == raw["alpha_pattern"] == {} and not raw["use_rslora"]
    assert max(relative_difference(adapter, read_adapter(tmp_path / "v")).values()) <= 1e-6


@pytest.mark.parametrize("tool", ["vllm", "llama.cpp", "ollama"])
def test_an_adapter_that_a_tool_cannot_hold_is_refused_and_nothing_is_written(
    capsys: Capture, model: Path, tmp_path: Path, tool: str
) -> None:
    write_adapter_folder(tmp_path / "a", with_magnitudes(adapter_for(model)))
    code, out, err = run(
        capsys, "convert", tmp_path / "a", tmp_path / "v", "--for", tool, "--model", model
    )
    assert code == 2 and out == "" and "it uses DoRA; merge it into its base" in err
    assert not list((tmp_path / "v").glob("*")) if (tmp_path / "v").exists() else True


def test_a_rank_above_vllms_is_refused_until_it_is_cut(capsys: Capture, tmp_path: Path) -> None:
    module = "model.layers.0.mlp.down_proj"
    weights = random_adapter({module: (600, 600)}, r=520)
    adapter = Adapter(weights=weights, r=520, lora_alpha=520.0, num_layers=1)
    write_adapter_folder(tmp_path / "a", adapter)
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "v", "--for", "vllm")
    assert code == 2 and "its rank is 520, and at most 512 is taken; --rank cuts it" in err
    code, out, err = run(
        *(capsys, "convert", tmp_path / "a", tmp_path / "v", "--for", "vllm"),
        *("--rank", "512", "--verify"),
    )
    assert code == 3 and "NOT the same adapter" in out
    assert "cut to rank 512: 1 deltas lost up to" in err
    found = read_adapter(tmp_path / "v")
    assert found.r == 512
    # No matrix of that rank is nearer (Eckart and Young).
    u, s, vt = np.linalg.svd(adapter.delta(module).astype(np.float64))
    best = (u[:, :512] * s[:512]) @ vt[:512]
    assert np.abs(found.delta(module) - best).max() <= 1e-5 * np.abs(best).max()


def test_llama_cpp_gets_the_rslora_scale_as_alpha(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    adapter = adapter_for(model)
    write_adapter_folder(tmp_path / "a", adapter)
    found = run_json(
        *(capsys, "convert", tmp_path / "a", tmp_path / "x.gguf", "--for", "llama.cpp"),
        *("--verify", "--model", model),
    )
    assert found["equal"] and found["max_relative_difference"] <= 1e-6
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    alpha = reader.get_field("adapter.lora.alpha").contents()
    # llama.cpp multiplies by alpha / rank.
    assert alpha / 4 == pytest.approx(adapter.scaling)
    assert reader.get_field("general.architecture").contents() == "phi3"
    tensors = {t.name: t for t in reader.tensors}
    a = tensors["blk.0.attn_qkv.weight.lora_a"]
    qkv = "model.layers.0.self_attn.qkv_proj"
    assert np.array_equal(a.data, adapter.pair(qkv)[0])
    back = run_json(
        capsys, "convert", tmp_path / "x.gguf", tmp_path / "b", "--to", "both", "--verify"
    )
    assert back["from"] == "gguf" and back["equal"]


def test_ollama_gets_a_modelfile_with_the_models_own_stops(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    write_adapter_folder(tmp_path / "a", adapter_for(model))
    code, _, err = run(
        capsys, "convert", tmp_path / "a", tmp_path / "o", "--for", "ollama", "--model", model
    )
    assert code == 0, err
    text = (tmp_path / "o/Modelfile").read_text()
    assert "ADAPTER ./adapter.gguf" in text and 'PARAMETER stop "<|end|>"' in text
    assert "PARAMETER num_ctx 512" in text and (tmp_path / "o/adapter.gguf").exists()


@pytest.mark.parametrize("kind", ["plain", "patterns", "dora"])
def test_verify_asks_a_backend_and_the_stock_tools(
    capsys: Capture, model: Path, tmp_path: Path, kind: str
) -> None:
    adapter = adapter_for(model)
    make = {"plain": lambda a: a, "patterns": with_patterns, "dora": with_magnitudes}[kind]
    write_adapter_folder(tmp_path / "a", make(adapter), to="peft")
    found = run_json(
        *(capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "both"),
        *("--verify", "--model", model),
    )
    assert found["equal"] and found["max_relative_difference"] <= 1e-6
    readers = [answer["reader"] for answer in found["answers"]]
    assert sorted(readers)[2:] == ["phi3-lora, cuda", "phi3-lora, mlx"]
    assert sorted(readers)[:2] == ["PEFT (stock, cuda)", "mlx-lm (stock, mlx)"]
    assert all(answer["max_difference"] <= 1e-4 for answer in found["answers"])


def test_verify_finds_a_stock_tool_with_other_answers(
    capsys: Capture, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that PEFT reads has lost its scale."""
    from phi3_lora.adapters.formats import peft as peft_layout

    write_adapter_folder(tmp_path / "a", adapter_for(model, use_rslora=False), to="mlx")
    whole = peft_layout.peft_config
    monkeypatch.setattr(peft_layout, "peft_config", lambda a: {**whole(a), "lora_alpha": 12})
    code, out, _ = run(
        *(capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "peft"),
        *("--verify", "--model", model),
    )
    assert code == 3 and "NOT the same adapter" in out


def test_several_adapters_become_one_exactly(capsys: Capture, model: Path, tmp_path: Path) -> None:
    first = adapter_for(model)
    second = with_patterns(adapter_for(model, seed=2, lora_alpha=2.0, use_rslora=False))
    write_adapter_folder(tmp_path / "1", first)
    write_adapter_folder(tmp_path / "2", second)
    found = run_json(
        *(capsys, "merge", "--model", model, "--to", "adapter", "--output", tmp_path / "s"),
        *("--adapter", tmp_path / "1", "--weight", 0.5),
        *("--adapter", tmp_path / "2", "--weight", -3),
    )
    assert found["ranks"] == [6, 8]
    total = read_adapter(tmp_path / "s")
    for module in first.modules:
        expected = 0.5 * first.delta(module) - 3.0 * second.delta(module)
        assert np.abs(total.delta(module) - expected).max() <= 1e-6 * np.abs(expected).max()
    write_adapter_folder(tmp_path / "3", with_magnitudes(first))
    code, _, err = run(
        *(capsys, "merge", "--model", model, "--to", "adapter", "--output", tmp_path / "t"),
        *("--adapter", tmp_path / "1", "--adapter", tmp_path / "3"),
    )
    assert code == 2 and "DoRA have no sum that is an adapter" in err
    assert not (tmp_path / "t").exists()
