"""Quantised bases: one grid gives equal numbers on both backends and in the stock tools."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model as load_with_mlx_lm
from transformers import Phi3ForCausalLM

from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.engine.protocol import Engine
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ModelError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.quantization.folder import MLX_FILE, read_grid, write_quantized_folder
from phi3_lora.models.quantization.grid import dequantize
from phi3_lora.models.weights import check_weights, read_model_files
from phi3_lora.storage.safetensors import read_float32, read_header
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from phi3_lora_mlx.model import load_model
from tests.parity.test_family import BACKENDS, opened
from tests.tiny import random_adapter, random_documents, write_model

SHAPES = {
    "plain": {},
    "grouped, tied, partial": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "hidden_size": 128,
        "intermediate_size": 160,
    },
    "a layer that stays dense": {"intermediate_size": 72},
    "LongRoPE, config of transformers 5": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0 + 0.01 * i for i in range(8)],
            "long_factor": [1.0 + i for i in range(8)],
        },
        "original_max_position_embeddings": 16,
        "rope_theta": None,
    },
    "bfloat16": {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
}


@pytest.fixture(params=[4, 8], ids=["4bit", "8bit"])
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=SHAPES)
def folder(request: pytest.FixtureRequest, bits: int, tmp_path: Path) -> Path:
    return quantized(write_model(tmp_path / "dense", **SHAPES[request.param]), bits)


def quantized(source: Path, bits: int) -> Path:
    config = read_model_config(source)
    target = source.with_name(f"{source.name}-{bits}bit")
    write_quantized_folder(source, config, check_weights(source, config), target, bits=bits)
    return target


def dense_model(folder: Path, config: ModelConfig) -> Phi3ForCausalLM:
    """Return stock transformers with the weights of the grid in float32."""
    source = folder.with_name("dense")
    model = Phi3ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = read_header(folder / MLX_FILE, ModelError)
    for module in config.grid_shapes():
        weight = torch.from_numpy(dequantize(read_grid(tensors, module)))
        model.get_submodule(module).weight.data = weight
    return model


def test_l1_logits_equal_the_dense_weights_and_l4_holds(folder: Path) -> None:
    config = read_model_config(folder)
    check_weights(folder, config)
    documents = random_documents([5, 40, 17])
    batch = make_batch(documents)
    reference = dense_model(folder, config)
    with torch.no_grad():
        rows = [reference(torch.from_numpy(d.tokens).long()[None]).logits[0] for d in documents]
    expected = torch.cat(rows).numpy()
    gradients = {}
    for backend in BACKENDS:
        engine = opened(folder, backend)
        with engine.base_only():
            found = engine.logits(batch, np.arange(len(batch.tokens), dtype=np.int32))
        assert np.abs(found - expected).max() <= 1e-4 * expected.std(), backend
        gradients[backend] = engine.gradients(batch, loss_tokens=30)
    for backend in BACKENDS:
        for name, value in gradients["cuda"].items():
            gap = np.linalg.norm(gradients[backend][name] - value) / np.linalg.norm(value)
            assert gap <= 1e-5, (backend, name)


def test_the_words_are_the_same_numbers_in_half_precision(folder: Path) -> None:
    """Dense weights of MLX and PyTorch equal those of the core bit for bit, in each dtype."""
    config = read_model_config(folder)
    tensors = read_header(folder / MLX_FILE, ModelError)
    module = "model.layers.1.mlp.gate_up_proj"
    expected = dequantize(read_grid(tensors, module))
    for dtype in ("float32", "bfloat16", "float16"):
        request = LoadRequest(model=read_model_files(folder), device="cpu", dtype=dtype)
        layer = load_model(request, on_gpu=False).model.model.layers[1].mlp.gate_up_proj
        dense = mx.dequantize(
            layer.weight, layer.scales, layer.biases, group_size=32, bits=config.grid_bits
        )
        assert str(dense.dtype).endswith(dtype)
        assert np.array_equal(np.array(dense.astype(mx.float32)), expected), dtype
        torch_layer = CudaBackend().open(request)._model.causal_lm.get_submodule(module)
        torch_dense = torch_layer.decode(torch_layer.weight)
        assert str(torch_dense.dtype).endswith(dtype)
        assert np.array_equal(torch_dense.float().numpy(), expected), dtype


def test_stock_transformers_and_stock_mlx_lm_load_the_folder(folder: Path) -> None:
    pytest.importorskip("compressed_tensors")
    config = read_model_config(folder)
    tokens = random_documents([24])[0].tokens
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()[None]
        expected = dense_model(folder, config)(ids).logits[0].numpy()
        stock = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = stock(ids).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-5 * expected.std()
    model, _ = load_with_mlx_lm(folder)
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(tokens)[None])[0])
    assert np.abs(logits - expected).max() <= 1e-4 * expected.std()


def test_embedding_and_head_keep_their_numbers(folder: Path) -> None:
    dense = read_header(folder.with_name("dense") / "model.safetensors", ModelError)
    tensors = read_header(folder / MLX_FILE, ModelError)
    kept = [n for n in dense if "proj" not in n]
    assert len(kept) >= 6
    for name in kept:
        assert np.array_equal(read_float32(dense[name]), read_float32(tensors[name]))


def test_l4_holds_with_dropout_checkpointing_and_layers_without_lora(tmp_path: Path) -> None:
    folder = quantized(write_model(tmp_path / "dense"), 4)
    shapes = read_model_config(folder).linear_shapes()
    first = "model.layers.0.self_attn.qkv_proj"
    spec = LoraSpec.uniform([first], r=4, scaling=2.0, dropout=0.2)
    batch = make_batch(random_documents([20, 33]))
    found = []
    for backend in (CudaBackend, MlxBackend):
        for checkpointing in (False, True):
            request = LoadRequest(
                model=read_model_files(folder),
                device="cpu",
                lora=spec,
                gradient_checkpointing=checkpointing,
            )
            engine = backend().open(request)
            engine.write_adapter(random_adapter({first: shapes[first]}, r=4))
            found.append(engine.gradients(batch, loss_tokens=26, step=3))
    for other in found[1:]:
        for name, value in found[0].items():
            assert np.linalg.norm(other[name] - value) <= 1e-5 * np.linalg.norm(value), name


def test_nf4_weights_equal_stock_transformers_and_train(tmp_path: Path) -> None:
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    from transformers import BitsAndBytesConfig

    folder = write_model(tmp_path / "dense", hidden_size=128, intermediate_size=256)
    engine = opened(folder, "cuda", quantize="nf4")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    stock = Phi3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=nf4, device_map={"": "cpu"}
    )
    reference = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in read_model_config(folder).linear_shapes():
        stored = stock.get_submodule(module).weight
        dense = dequantize_4bit(stored.data, stored.quant_state)
        reference.get_submodule(module).weight.data = dense
    documents = random_documents([24])
    with torch.no_grad(), engine.base_only():
        ids = torch.from_numpy(documents[0].tokens).long()[None]
        expected = reference(ids).logits[0].numpy()
        found = engine.logits(make_batch(documents), np.arange(24, dtype=np.int32))
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()
    assert_learns(engine)


def test_mlx_affine_equals_mlx_lms_own_and_trains(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", hidden_size=128, intermediate_size=256)
    engine = opened(folder, "mlx", quantize="mlx-affine")
    from mlx_lm.utils import quantize_model

    documents = random_documents([24])
    stock, _ = quantize_model(*load_with_mlx_lm(folder), 64, 4)
    expected = np.array(stock(mx.array(documents[0].tokens)[None])[0])
    with engine.base_only():
        found = engine.logits(make_batch(documents), np.arange(24, dtype=np.int32))
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()
    assert_learns(engine)


def assert_learns(engine: Engine) -> None:
    batch = make_batch(random_documents([24]))
    count = int(batch.loss_mask.sum())
    losses = [
        float(engine.train_step(batch, loss_tokens=count, lr=1e-2, step=step).loss)
        for step in range(1, 6)
    ]
    assert losses[-1] < 0.5 * losses[0]
