"""The command parity: the laws hold with LongRoPE and a window, and a bug misses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.program import phi3_lora_here
from tests.tiny import write_model

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_model(
        tmp_path_factory.mktemp("model"),
        rope_scaling={"type": "longrope", **FACTORS},
        original_max_position_embeddings=64,
        sliding_window=40,
        num_key_value_heads=2,
    )
    return str(folder)


def parity(model: str, *more: str):
    return phi3_lora_here("parity", "--model", model, "--device", "cpu", "--steps", "3", *more)


def test_every_law_holds(model: str) -> None:
    found = parity(model, "--json")
    assert found.returncode == 0, found.stderr + found.stdout
    result = json.loads(found.stdout)
    assert result["holds"] and sorted(result["backends"]) == ["cuda", "mlx"]
    names = [law["law"] for law in result["laws"]]
    assert names == ["L1", "L2", "L4", "L4", "L5", "L6", "L7", "L7"]


def test_a_wrong_scale_on_one_backend_misses_the_laws(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_lora_mlx.lora import LoRALinear

    original = LoRALinear.__init__

    def with_another_scale(self, *arguments, **options) -> None:
        original(self, *arguments, **options)
        self._scaling *= 1.01

    monkeypatch.setattr(LoRALinear, "__init__", with_another_scale)
    found = parity(model)
    assert found.returncode == 3 and "MISSED" in found.stdout
    missed = [line for line in found.stdout.splitlines() if "MISSED" in line]
    assert any("gradients" in line for line in missed)
    assert all("logits of the base" not in line for line in missed)


def test_one_backend_alone_is_reported(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3_lora.engine.registry._auto_order", lambda: ["mlx"])
    found = parity(model)
    assert found.returncode == 0 and "verify needs just one" in found.stderr


def test_an_adapter_and_data_of_the_user_are_measured(model: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hello", "completion": "Good day."}\n' * 8)
    run = ("train", "--model", model, "--data", str(rows), "--output", str(tmp_path / "run"))
    done = phi3_lora_here(*run, "--backend", "cuda", "--device", "cpu", "--epochs", "3")
    assert done.returncode == 0, done.stderr
    found = parity(model, "--adapter", str(tmp_path / "run" / "adapter"), "--data", str(rows))
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_backend_at_all_is_an_error(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3_lora.engine.registry._auto_order", lambda: [])
    assert parity(model).returncode == 2
