"""Model folders that the frameworks would read in different ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import write_adapter_folder
from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.request import LoadRequest, Sampling
from phi3_lora.errors import ModelError
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.weights import check_weights, read_model_files
from phi3_lora.storage.safetensors import encode, read_all_float32
from phi3_lora_cuda import CudaBackend
from phi3_lora_mlx import MlxBackend
from tests.tiny import lora_spec, random_adapter, random_documents, write_model

BACKENDS = {"mlx": MlxBackend, "cuda": CudaBackend}


def opened(folder: Path, backend: str, **changes: object):
    config = read_model_config(folder)
    request = LoadRequest(
        model=read_model_files(folder), device="cpu", lora=lora_spec(config), **changes
    )
    engine = BACKENDS[backend]().open(request)
    engine.write_adapter(random_adapter(config.linear_shapes(), r=4))
    return engine


def gradients(folder: Path, backend: str, **changes: object) -> dict:
    batch = make_batch(random_documents([20, 30]))
    return opened(folder, backend, **changes).gradients(batch, loss_tokens=25)


def largest(found: dict, expected: dict) -> float:
    return max(
        float(np.linalg.norm(found[n] - expected[n]) / np.linalg.norm(expected[n]))
        for n in expected
    )


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers would load the adapter into the base model."""
    folder = write_model(tmp_path)
    shapes = read_model_config(folder).linear_shapes()
    adapter = Adapter(weights=random_adapter(shapes, r=4), r=4, lora_alpha=8.0, num_layers=2)
    write_adapter_folder(tmp_path / "a", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        check_weights(folder, read_model_config(folder))


def test_weights_that_no_index_names_are_refused(tmp_path: Path) -> None:
    """mlx-lm reads every model*.safetensors."""
    folder = write_model(tmp_path)
    (folder / "model_old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"model_old\.safetensors"):
        check_weights(folder, read_model_config(folder))


def test_a_stored_head_that_is_not_the_tied_one_is_refused(tmp_path: Path) -> None:
    """transformers would use the tensor, mlx-lm would not."""
    folder = write_model(tmp_path, tie_word_embeddings=True)
    path = folder / "model.safetensors"
    weights = read_all_float32(path, ModelError)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    path.write_bytes(encode(weights))
    check_weights(folder, read_model_config(folder))
    weights["lm_head.weight"][0, 0] += 1
    path.write_bytes(encode(weights))
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        check_weights(folder, read_model_config(folder))


def test_dropout_of_the_base_model_is_off_in_training(tmp_path: Path) -> None:
    folder = write_model(tmp_path, resid_pdrop=0.3, attention_dropout=0.3, embd_pdrop=0.3)
    assert largest(gradients(folder, "cuda"), gradients(folder, "mlx")) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_vocabulary_needs_no_pad_token(tmp_path: Path, backend: str) -> None:
    folder = write_model(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    del raw["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert gradients(folder, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_training_does_not_change_generation(tmp_path: Path, backend: str) -> None:
    folder = write_model(tmp_path)
    prompt = random_documents([20])[0].tokens.tolist()
    plain, checkpointed = (
        list(opened(folder, backend, **changes).generate([prompt], Sampling(max_new_tokens=8)))
        for changes in ({}, {"gradient_checkpointing": True})
    )
    assert plain == checkpointed


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_do_not_vanish_in_large_steps(tmp_path: Path, backend: str) -> None:
    """A step with 200,000 supervised tokens divides each gradient by 200,000."""
    folder = write_model(tmp_path)
    batch = make_batch(random_documents([20, 30]))
    found = opened(folder, backend, dtype="float16").gradients(batch, loss_tokens=200_000)
    expected = opened(folder, backend).gradients(batch, loss_tokens=200_000)
    assert largest(found, expected) <= 0.01


def test_longrope_without_its_boundary_means_that_of_transformers(tmp_path: Path) -> None:
    factors = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = write_model(tmp_path, rope_scaling=factors, max_position_embeddings=8192)
    raw = json.loads((folder / "config.json").read_text())
    del raw["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_model_config(folder).original_max_position_embeddings == 4096


@pytest.mark.parametrize("backend", BACKENDS)
def test_code_that_auto_map_names_is_never_run(tmp_path: Path, backend: str) -> None:
    auto_map = {"AutoConfig": "evil.Phi3Config", "AutoModelForCausalLM": "evil.Phi3ForCausalLM"}
    folder = write_model(tmp_path / "mapped", auto_map=auto_map)
    (folder / "evil.py").write_text("raise SystemExit('code of the model folder was run')")
    expected = gradients(write_model(tmp_path / "plain"), backend)
    assert largest(gradients(folder, backend), expected) == 0.0
