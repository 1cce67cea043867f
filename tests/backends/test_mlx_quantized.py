"""LoRA on MLX with a base model that mlx-lm quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.request import LoadRequest
from phi3_lora.errors import ModelError
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import read_model_files
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from tests.tiny import lora_spec, random_adapter, random_documents, write_model, write_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write_model(tmp_path / "plain", hidden_size=128, intermediate_size=128)
    model, config = quantize_model(*load_model(source), 64, 4)
    target = tmp_path / "quantized"
    target.mkdir()
    save_model(target, model)
    save_config(config, target / "config.json")
    write_tokenizer(target)
    return target


def test_base_logits_equal_stock_mlx_lm_and_lora_learns(folder: Path) -> None:
    import mlx.core as mx

    config = read_model_config(folder)
    request = LoadRequest(model=read_model_files(folder), device="cpu", lora=lora_spec(config))
    engine = MlxBackend().open(request)
    engine.write_adapter(random_adapter(config.linear_shapes(), r=4))
    documents = random_documents([24])
    stock, _ = load_model(folder)
    expected = np.array(stock(mx.array(documents[0].tokens)[None])[0])
    batch = make_batch(documents)
    with engine.base_only():
        found = engine.logits(batch, np.arange(24, dtype=np.int32))
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()
    count = int(batch.loss_mask.sum())
    losses = [
        float(engine.train_step(batch, loss_tokens=count, lr=1e-2, step=step).loss)
        for step in range(1, 6)
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_pytorch_refuses_it_and_says_what_to_use(folder: Path) -> None:
    with pytest.raises(
        ModelError, match="use the unquantised model with --quantize, or --backend mlx"
    ):
        CudaBackend().open(LoadRequest(model=read_model_files(folder), device="cpu"))
