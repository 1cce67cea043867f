from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.deltas import Weighted
from phi3_lora.errors import AdapterError, ModelError
from phi3_lora.export.merge import Merge, merge_to_gguf
from phi3_lora.inference.base_model import find_base_model
from phi3_lora.inference.loading import load_adapter
from phi3_lora.models.weights import check_weights
from phi3_lora.storage.safetensors import encode
from tests.tiny import random_adapter, random_weights, write_model

MODULE = "model.layers.1.mlp.gate_up_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Adapter:
    base = find_base_model(str(model), None)
    folder = tmp_path / "adapter"
    folder.mkdir()
    shapes = {MODULE: base.config.linear_shapes()[MODULE]}
    (folder / "adapter_model.safetensors").write_bytes(encode(random_adapter(shapes, r=4)))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["gate_up_proj"]}
    config |= {"layers_to_transform": [1]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return load_adapter(str(folder), base).adapter


def merged(model: Path, adapter: Adapter, target: Path, out_type: str | None = None) -> Merge:
    base = find_base_model(str(model), None)
    tensors = check_weights(model, base.config)
    parts = [Weighted(adapter, 1.0)]
    return merge_to_gguf(model, base.config, tensors, parts, target, out_type=out_type)


def expected(model: Path, adapter: Adapter) -> np.ndarray:
    a, b = adapter.pair(MODULE)
    own = random_weights(find_base_model(str(model), None).config, 0)[f"{MODULE}.weight"]
    return own + 2.0 * (b.astype(np.float64) @ a.astype(np.float64))


def stored(target: Path, name: str) -> np.ndarray:
    tensors = {t.name: t for t in gguf.GGUFReader(target / "model.gguf").tensors}
    return gguf.dequantize(tensors[name].data, tensors[name].tensor_type)


def test_the_file_holds_base_and_delta_in_the_bases_own_type(
    model: Path, adapter: Adapter, tmp_path: Path
) -> None:
    result = merged(model, adapter, tmp_path / "out")
    found = stored(tmp_path / "out", "blk.1.ffn_up.weight")
    np.testing.assert_allclose(found, expected(model, adapter), rtol=1e-6, atol=1e-6)
    assert result.dtype == "f32"
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


def test_survival_of_q8_0_is_measured_on_its_steps(
    model: Path, adapter: Adapter, tmp_path: Path
) -> None:
    kept = merged(model, adapter, tmp_path / "out", "q8_0").survival[MODULE]
    change = stored(tmp_path / "out", "blk.1.ffn_up.weight").astype(np.float64)
    own = random_weights(find_base_model(str(model), None).config, 0)[f"{MODULE}.weight"]
    change, delta = change - own, expected(model, adapter) - own
    cosine = np.vdot(delta, change) / np.linalg.norm(delta) / np.linalg.norm(change)
    assert kept.cosine == pytest.approx(cosine, abs=1e-9)
    assert kept.cosine < 0.999999


def test_a_target_in_use_or_a_missing_package_is_told_before_any_work(
    model: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdapterError, match="is in use"):
        merged(model, adapter, model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"phi3-lora\[gguf\]"):
        merged(model, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
