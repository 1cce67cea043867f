"""The command merge: the result is base plus adapter in both backends and the stock tools."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model as load_with_mlx_lm
from transformers import Phi3ForCausalLM

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import write_adapter_folder
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ModelError
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import check_weights, read_model_files
from phi3_lora.models.writer import write_shards
from phi3_lora.storage.safetensors import NewTensor, from_float32, read_float32, read_header
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from tests.cli.test_contract import Capture, run, run_json
from tests.tiny import random_adapter, random_documents, write_model

DOCUMENTS = random_documents([30, 7])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def write_adapter(folder: Path, model: Path, *, seed: int = 1, scale: float = 1.0) -> Adapter:
    config = read_model_config(model)
    weights = random_adapter(config.linear_shapes(), r=4, seed=seed)
    weights = {n: v * np.float32(scale) if "lora_B" in n else v for n, v in weights.items()}
    adapter = Adapter(weights=weights, r=4, lora_alpha=8.0, num_layers=2)
    write_adapter_folder(folder, adapter)
    return adapter


def logits(folder: Path, backend: type, adapter: Adapter | None = None) -> np.ndarray:
    spec = None if adapter is None else adapter.spec
    engine = backend().open(LoadRequest(model=read_model_files(folder), device="cpu", lora=spec))
    if adapter is not None:
        engine.write_adapter(adapter.weights)
    batch = make_batch(DOCUMENTS)
    return engine.logits(batch, np.arange(len(batch.tokens), dtype=np.int32))


def merged(capsys: Capture, model: Path, *arguments: str | Path) -> dict:
    return run_json(capsys, "merge", "--model", model, *arguments)


def test_the_result_is_base_plus_adapter_everywhere(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", model)
    found = merged(capsys, model, "--adapter", tmp_path / "a", "--output", tmp_path / "out")
    assert found["dtype"] == "float32" and len(found["survival"]) == 8
    assert all(kept["cosine"] > 1 - 1e-9 for kept in found["survival"].values())
    check_weights(tmp_path / "out", read_model_config(tmp_path / "out"))
    expected = logits(model, CudaBackend, adapter)
    gate = 1e-4 * expected.std()
    for backend in (CudaBackend, MlxBackend):
        assert np.abs(logits(tmp_path / "out", backend) - expected).max() <= gate
    ids = torch.from_numpy(DOCUMENTS[0].tokens).long()[None]
    with torch.no_grad():
        stock = Phi3ForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits[0].numpy()
    assert np.abs(stock - expected[:30]).max() <= gate
    stock_mlx, _ = load_with_mlx_lm(tmp_path / "out")
    assert np.abs(np.array(stock_mlx(mx.array(ids.numpy()))[0]) - expected[:30]).max() <= gate


def test_several_adapters_add_up_by_weight(capsys: Capture, model: Path, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", model, seed=1)
    second = write_adapter(tmp_path / "b", model, seed=2)
    both = ["--adapter", tmp_path / "a", "--adapter", tmp_path / "b"]
    merged(capsys, model, *both, "--weight", "0.25", "--weight=-2", "--output", tmp_path / "out")
    module = "model.layers.1.self_attn.qkv_proj"
    base, result = (
        read_float32(read_header(f / "model.safetensors", ModelError)[f"{module}.weight"])
        for f in (model, tmp_path / "out")
    )
    expected = base + 0.25 * first.delta(module) - 2 * second.delta(module)
    assert np.abs(result - expected).max() <= 1e-6 * np.abs(expected).max()
    code, _, err = run(capsys, "merge", "--model", model, *both, "--weight", "1", "--output", "x")
    assert code == 2 and "2 --adapter and 1 --weight" in err


def test_the_loss_of_bfloat16_is_measured_and_reported(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", model, scale=2e-3)
    code, out, err = run(
        *(capsys, "merge", "--model", model, "--adapter", tmp_path / "a", "--dtype", "bfloat16"),
        *("--output", tmp_path / "out"),
    )
    assert code == 0 and "holds only part of the adapter" in err and "least:" in out
    found = merged(
        *(capsys, model, "--adapter", tmp_path / "a", "--dtype", "bfloat16"),
        *("--output", tmp_path / "again"),
    )
    module = "model.layers.0.mlp.down_proj"
    info = read_header(model / "model.safetensors", ModelError)[f"{module}.weight"]
    base = torch.from_numpy(read_float32(info)).double()
    delta = torch.from_numpy(adapter.delta(module)).double()
    change = (base + delta).to(torch.bfloat16).double() - base
    kept = found["survival"][module]
    cosine = float((delta * change).sum() / (delta.norm() * change.norm()))
    assert kept["cosine"] == pytest.approx(cosine, rel=1e-4)
    assert kept["norm_ratio"] == pytest.approx(float(change.norm() / delta.norm()), rel=1e-4)


def test_a_quantised_base_is_refused_unless_written_in_full(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", model)
    run_json(capsys, "quantize", "--model", model, "--output", tmp_path / "q")
    arguments = ["--adapter", tmp_path / "a", "--output", tmp_path / "out"]
    code, _, err = run(capsys, "merge", "--model", tmp_path / "q", *arguments)
    assert code == 2 and "--dequantize" in err and not (tmp_path / "out").exists()
    merged(capsys, tmp_path / "q", *arguments, "--dequantize")
    config = read_model_config(tmp_path / "out")
    assert config.quantization is None
    expected = logits(tmp_path / "q", CudaBackend, adapter)
    found = logits(tmp_path / "out", MlxBackend)
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


def test_bad_targets_and_numbers_leave_nothing(
    capsys: Capture, model: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "a", model, scale=1e7)
    arguments = ["merge", "--model", model, "--adapter", tmp_path / "a"]
    code, _, err = run(capsys, *arguments, "--output", tmp_path / "a")
    assert code == 2 and "is in use" in err
    code, _, err = run(capsys, *arguments, "--dtype", "float16", "--output", tmp_path / "out")
    assert code == 2 and "does not hold" in err and not (tmp_path / "out").exists()
    write_adapter(tmp_path / "zero", model, scale=0.0)
    code, _, err = run(
        *(capsys, "merge", "--model", model, "--adapter", tmp_path / "zero"),
        *("--output", tmp_path / "out"),
    )
    assert code == 0 and "nothing is changed" in err


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    ties = (np.arange(1000, dtype=np.uint32) << 16 | 0x3F80_8000).view(np.float32)
    values = np.concatenate([values, ties])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(from_float32(values, "BF16").view(np.int16), expected)


def test_shards_hold_whole_tensors_and_an_index(tmp_path: Path) -> None:
    value = np.arange(8, dtype=np.float32)
    tensors = {n: NewTensor("F32", (8,), value.copy) for n in ("a", "b", "c")}
    write_shards(tmp_path, tensors, shard_bytes=70)
    names = [p.name for p in sorted(tmp_path.glob("*.safetensors"))]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(read_header(tmp_path / names[0], ModelError)) == ["a", "b"]
