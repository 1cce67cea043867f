"""Adapters of stock PEFT and stock mlx-lm keep their logits here and after every conversion."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.adapters.convert import ConversionRequest, convert
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.reading import read_source
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.request import LoadRequest
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import read_model_files
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from tests.tiny import random_documents, write_model

peft = pytest.importorskip("peft")
pytest.importorskip("gguf")

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
EVERY = ("peft", "mlx", "both", "unfused", "loralib", "gguf")
NO_DORA = ("peft", "mlx", "both", "unfused")
PEFT_MADE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dora": ({"use_dora": True}, NO_DORA),
    "rslora": ({"use_rslora": True}, EVERY),
    "patterns": (
        {"rank_pattern": {"o_proj": 2, r"1\.mlp\.down_proj": 7}, "alpha_pattern": {"qkv_proj": 3}},
        EVERY,
    ),
    "dora-patterns": ({"use_dora": True, "rank_pattern": {"o_proj": 2}}, NO_DORA),
    "tail": ({"layers_to_transform": [1]}, EVERY),
    "first-layer": ({"layers_to_transform": [0]}, EVERY),
    "outside": ({"target_modules": ["embed_tokens", "o_proj", "lm_head"]}, EVERY),
    "saved": ({"modules_to_save": ["lm_head", "norm"]}, ("peft", "unfused")),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), num_key_value_heads=2)


TOKENS = random_documents([24])[0].tokens


def made_by_peft(model: Path, folder: Path, **settings: Any) -> np.ndarray:
    """Write a random adapter with PEFT, and return PEFT's logits with it."""
    import torch
    from transformers import Phi3ForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = Phi3ForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, task_type="CAUSAL_LM", **{"target_modules": ALL, **settings}
        )
        adapted = peft.get_peft_model(base, config)
        torch.manual_seed(0)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(torch.from_numpy(TOKENS).long()[None]).logits[0].numpy()


def made_by_mlx_lm(model: Path, folder: Path, kind: str, **parameters: Any) -> np.ndarray:
    """Write a random adapter like mlx-lm's trainer, and return mlx-lm's logits with it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    num_layers = parameters.pop("num_layers", 2)
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0, **parameters}
    loaded, _ = load_model(model)
    loaded.freeze()
    linear_to_lora_layers(loaded, num_layers, settings, use_dora=kind == "dora")
    rng = np.random.default_rng(0)
    values = {
        name: value + mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32))
        for name, value in tree_flatten(loaded.trainable_parameters())
    }
    loaded.load_weights(list(values.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), values)
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loaded.eval()
    return np.array(loaded(mx.array(TOKENS)[None])[0])


def assert_answers(
    source: Path, model: Path, expected: np.ndarray, untold: MissingMetadata
) -> None:
    config = read_model_config(model)
    adapter, _ = read_source(source, config, untold)
    batch, rows = make_batch(random_documents([24])), np.arange(24, dtype=np.int32)
    for backend in (CudaBackend(), MlxBackend()):
        engine = backend.open(
            LoadRequest(model=read_model_files(model), device="cpu", lora=adapter.spec)
        )
        engine.write_adapter(adapter.weights)
        gap = np.abs(engine.logits(batch, rows) - expected).max()
        assert gap <= 1e-4 * expected.std(), (source, backend.name)


def assert_conversions(
    source: Path, model: Path, expected: np.ndarray, layouts: tuple[str, ...], folder: Path
) -> None:
    """Stock tools that read a layout give the logits of the tool that made the adapter."""
    config = read_model_config(model)
    for to in layouts:
        target = folder / f"to-{to}"
        found = convert(ConversionRequest(source=source, target=target, to=to, config=config))
        assert found.max_relative_difference <= 1e-6, to
        alpha = next((float(n.rsplit(" ", 1)[-1]) for n in found.notes if "lora_alpha" in n), None)
        assert_answers(target, model, expected, MissingMetadata(alpha=alpha))
        for backend in (CudaBackend(), MlxBackend()):
            if backend.stock_layout in to.replace("both", "peft mlx").split():
                logits = backend.stock_logits(model, target, TOKENS)
                assert np.abs(logits - expected).max() <= 1e-4 * expected.std(), (to, backend.name)


@pytest.mark.parametrize("name", PEFT_MADE)
def test_adapters_of_stock_peft(model: Path, tmp_path: Path, name: str) -> None:
    settings, layouts = PEFT_MADE[name]
    expected = made_by_peft(model, tmp_path / "a", **settings)
    bare = CudaBackend().open(LoadRequest(model=read_model_files(model), device="cpu"))
    batch, rows = make_batch(random_documents([24])), np.arange(24, dtype=np.int32)
    assert np.abs(bare.logits(batch, rows) - expected).max() > 0.1 * expected.std()
    assert_answers(tmp_path / "a", model, expected, MissingMetadata())
    assert_conversions(tmp_path / "a", model, expected, layouts, tmp_path)


@pytest.mark.parametrize(
    ("kind", "parameters", "layouts"),
    [
        ("lora", {}, EVERY),
        ("lora", {"num_layers": 1}, EVERY),
        ("lora", {"keys": ["self_attn.qkv_proj", "mlp.down_proj"], "scale": 20.0}, EVERY),
        ("lora", {"keys": ["self_attn.o_proj", "model.embed_tokens", "lm_head"]}, EVERY),
        ("dora", {}, NO_DORA),
        ("dora", {"num_layers": 1, "keys": ["self_attn.qkv_proj", "lm_head"]}, NO_DORA),
    ],
)
def test_adapters_of_stock_mlx_lm(
    model: Path, tmp_path: Path, kind: str, parameters: dict[str, Any], layouts: tuple[str, ...]
) -> None:
    expected = made_by_mlx_lm(model, tmp_path / "a", kind, **parameters)
    assert_answers(tmp_path / "a", model, expected, MissingMetadata())
    assert_conversions(tmp_path / "a", model, expected, layouts, tmp_path)


def test_dora_of_separate_q_and_v_takes_the_base_rows_for_k(model: Path, tmp_path: Path) -> None:
    """For k, which a llama-style adapter leaves out, the fused magnitude is the base's norm."""
    from phi3_lora.adapters.formats.folder import read_adapter, write_adapter_folder
    from phi3_lora.errors import AdapterError
    from phi3_lora.inference.base_model import find_base_model
    from phi3_lora.inference.loading import check_base_model, load_adapter

    config = read_model_config(model)
    made_by_peft(model, tmp_path / "a", use_dora=True)
    whole = read_adapter(tmp_path / "a")
    write_adapter_folder(tmp_path / "u", whole, to="unfused", base=config)
    split = read_adapter(tmp_path / "u", config, keep_parts=True)
    without_k = {n: v for n, v in split.weights.items() if "k_proj" not in n}
    write_adapter_folder(tmp_path / "qv", dataclasses.replace(split, weights=without_k), to="peft")
    with pytest.raises(AdapterError, match="DoRA needs the base's weights for it: pass --model"):
        read_adapter(tmp_path / "qv", config)
    base = find_base_model(str(model))
    found = load_adapter(str(tmp_path / "qv"), base).adapter
    qkv = "model.layers.0.self_attn.qkv_proj"
    magnitude = found.weights[f"base_model.model.{qkv}.lora_magnitude_vector"]
    expected = np.linalg.norm(check_base_model(base).weight(qkv).astype(np.float64), axis=1)
    np.testing.assert_allclose(magnitude[64:96], expected[64:96], rtol=1e-6)
    assert not found.pair(qkv)[1][64:96].any()
