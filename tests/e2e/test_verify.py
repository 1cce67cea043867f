"""The command verify: an adapter is equal on both backends, and a changed one differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.adapters.fingerprint import FINGERPRINT_NAME
from phi3_lora.errors import AdapterError
from phi3_lora.storage.safetensors import encode, read_all_float32
from tests.e2e.program import phi3_lora_here, train_arguments
from tests.tiny import chat, write_model, write_rows

BACKENDS = ("mlx", "cuda")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", params=BACKENDS)
def adapter(
    request: pytest.FixtureRequest, model: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", [chat(f"q {i}", f"a {i % 3}") for i in range(8)])
    words = train_arguments((model, str(rows)), folder / "run", request.param)
    done = phi3_lora_here(*words, "--max-steps", "8")
    assert done.returncode == 0, done.stderr
    return folder / "run" / "adapter"


def verify(adapter: Path, model: str, backend: str = "cuda"):
    return phi3_lora_here(
        *("verify", str(adapter), "--model", model, "--backend", backend),
        *("--device", "cpu", "--json"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_is_equal_on_either_backend(adapter: Path, model: str, backend: str) -> None:
    found = verify(adapter, model, backend)
    assert found.returncode == 0, found.stderr
    verdict = json.loads(found.stdout)
    assert verdict["max_difference"] <= 1e-4 and verdict["equal"] and verdict["same_base"]
    assert verdict["greedy_agreement"] >= 0.99


def test_a_conversion_keeps_the_fingerprint(adapter: Path, model: str, tmp_path: Path) -> None:
    words = ("convert", str(adapter), str(tmp_path / "out"), "--to", "mlx", "--model", model)
    assert phi3_lora_here(*words).returncode == 0
    assert verify(tmp_path / "out", model, "mlx").returncode == 0


def test_a_changed_adapter_is_different(adapter: Path, model: str, tmp_path: Path) -> None:
    assert (
        phi3_lora_here("convert", str(adapter), str(tmp_path / "a"), "--to", "peft").returncode == 0
    )
    path = tmp_path / "a" / "adapter_model.safetensors"
    weights = {n: v * np.float32(3) for n, v in read_all_float32(path, AdapterError).items()}
    path.write_bytes(encode(weights))
    found = verify(tmp_path / "a", model)
    assert found.returncode == 3 and not json.loads(found.stdout)["equal"], found.stderr


def test_another_base_is_reported(adapter: Path, tmp_path: Path) -> None:
    found = verify(adapter, str(write_model(tmp_path / "other", seed=1)))
    assert found.returncode == 3 and "another base model" in found.stderr
    assert json.loads(found.stdout)["base_max_difference"] > 0.1


def test_a_missing_or_damaged_fingerprint_is_reported(
    adapter: Path, model: str, tmp_path: Path
) -> None:
    phi3_lora_here("convert", str(adapter), str(tmp_path / "a"), "--to", "peft")
    path = tmp_path / "a" / FINGERPRINT_NAME
    path.write_bytes(encode({"tokens": np.zeros(3, np.float32)}))
    found = verify(tmp_path / "a", model)
    assert found.returncode == 2 and "is damaged" in found.stderr
    path.unlink()
    found = verify(tmp_path / "a", model)
    assert found.returncode == 2 and "nothing to compare with" in found.stderr
