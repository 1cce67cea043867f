"""The laws of parity, measured on toy engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter, with_spec
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.inference.base_model import FoundModel, find_base_model
from phi3_lora.verification.fingerprint import probe_documents
from phi3_lora.verification.parity import ParityInputs, run_laws
from tests.tiny import write_model
from tests.unit.toy_engine import B_NAME, MODULE, ToyEngine

VOCABULARY = 264


@pytest.fixture
def base(tmp_path: Path) -> FoundModel:
    return find_base_model(str(write_model(tmp_path / "m", vocab_size=VOCABULARY)))


@pytest.fixture
def adapter() -> Adapter:
    weights = ToyEngine().read_adapter()
    weights[B_NAME] = np.full_like(weights[B_NAME], 0.01)
    spec = LoraSpec.uniform({MODULE: (8, 8)}, r=2, scaling=2.0)
    return with_spec(weights, spec, lora_dropout=0.0, base_model="m", num_layers=1)


def toy_backend(engine: ToyEngine) -> Any:
    return SimpleNamespace(name="toy", quantizations=frozenset(), open=lambda request: engine)


def laws(base: FoundModel, adapter: Adapter, engines: list[ToyEngine]) -> tuple[Any, list[str]]:
    notes: list[str] = []
    inputs = ParityInputs(base, probe_documents(base.tokenizer), adapter, num_steps=3)
    backends = {f"toy{i}": toy_backend(engine) for i, engine in enumerate(engines)}
    return run_laws(inputs, backends, "cpu", notes.append), notes


def test_all_laws_hold_for_two_equal_backends(base: FoundModel, adapter: Adapter) -> None:
    engines = [ToyEngine(vocab_size=VOCABULARY) for _ in range(2)]
    result, notes = laws(base, adapter, engines)
    assert result.holds and notes == []
    assert [law.law for law in result.laws] == ["L1", "L2", "L4", "L4", "L5", "L6", "L7", "L7"]
    assert all(engine.is_closed for engine in engines)
    assert result.to_dict()["backends"] == ["toy0", "toy1"]


def test_a_backend_with_other_weights_misses_laws(base: FoundModel, adapter: Adapter) -> None:
    engines = [ToyEngine(vocab_size=VOCABULARY, seed=seed) for seed in range(2)]
    result, _ = laws(base, adapter, engines)
    missed = {law.law for law in result.laws if not law.holds}
    assert missed == {"L1", "L4", "L5", "L6"} and not result.holds
    assert result.to_dict()["holds"] is False


def test_one_backend_is_measured_alone_with_a_note(base: FoundModel, adapter: Adapter) -> None:
    result, notes = laws(base, adapter, [ToyEngine(vocab_size=VOCABULARY)])
    assert [law.law for law in result.laws] == ["L7"] and result.holds
    assert len(notes) == 1 and "one backend only" in notes[0]
