"""The comparison of a converted adapter with its source."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phi3_lora.adapters.adapter import Adapter, with_spec
from phi3_lora.arrays import Float32, Tensors
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.inference.base_model import find_base_model
from phi3_lora.verification import conversion
from phi3_lora.verification.conversion import Answers, ConversionCheck, compare_answers
from tests.tiny import random_adapter, write_model


class Counted:
    """An engine whose logits are the first number of its adapter times the position."""

    opened = 0
    closed = 0

    def __init__(self, weights: Tensors) -> None:
        Counted.opened += 1
        self.write_adapter(weights)

    def write_adapter(self, weights: Tensors) -> None:
        self.value = float(next(iter(weights.values())).flat[0])

    def logits(self, batch: Any, rows: Any) -> Float32:
        return np.outer(rows, [self.value, 2.0]).astype(np.float32)

    def close(self) -> None:
        Counted.closed += 1


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    base = find_base_model(str(write_model(tmp_path / "m")))
    shapes = base.config.linear_shapes()
    spec = LoraSpec.uniform(shapes, r=2, scaling=2.0)
    return with_spec(
        random_adapter(shapes, r=2), spec, lora_dropout=0.0, base_model="m", num_layers=2
    )


@pytest.mark.parametrize(("change", "times"), [({}, 1), ({"use_rslora": True}, 2)])
def test_a_model_is_loaded_once_for_two_adapters_of_one_spec(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    adapter: Adapter,
    change: dict[str, bool],
    times: int,
) -> None:
    monkeypatch.setattr(
        conversion,
        "open_engine",
        lambda base, adapter, *_: SimpleNamespace(engine=Counted(adapter.weights)),
    )
    monkeypatch.setattr(Counted, "opened", 0)
    monkeypatch.setattr(Counted, "closed", 0)
    other = with_spec(
        {name: value + 1 for name, value in adapter.weights.items()},
        dataclasses.replace(adapter.spec, **change),
        lora_dropout=0.0,
        base_model="m",
        num_layers=2,
    )
    base = find_base_model(str(tmp_path / "m"))
    backend = SimpleNamespace(stock_layout="peft", stock_tool="PEFT")
    (answers,) = compare_answers(
        base,
        (adapter, other),
        tmp_path / "none.gguf",
        {"toy": backend},  # type: ignore[dict-item]
        lambda _: None,
    )
    assert (Counted.opened, Counted.closed) == (times, times)
    assert answers.max_difference > 0


def test_a_check_reports_the_deltas_and_each_readers_answers() -> None:
    close = Answers("phi3-lora, toy", 1e-6, 1e-4)
    far = Answers("PEFT (stock, toy)", 1e-2, 1e-4)
    unjudged = far._replace(gate=None)
    check = ConversionCheck(1e-9, "q", (close, unjudged))
    assert check.to_dict() == {
        "max_relative_difference": 1e-9,
        "worst_module": "q",
        "equal": True,
        "answers": [
            {"reader": "phi3-lora, toy", "max_difference": 1e-6, "gate": 1e-4, "equal": True},
            {"reader": "PEFT (stock, toy)", "max_difference": 1e-2, "gate": None, "equal": True},
        ],
    }
    assert not ConversionCheck(1e-9, "q", (close, far)).is_equal
    assert not ConversionCheck(1e-2, "q", (close,)).is_equal


def test_a_check_without_a_model_reports_no_answers() -> None:
    assert ConversionCheck(0.0, None, None).to_dict() == {
        "max_relative_difference": 0.0,
        "worst_module": None,
        "equal": True,
    }
