"""Quantisation of a base model in one call."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_lora.errors import ModelError
from phi3_lora.inference.quantize import quantize
from tests.tiny import write_model


def test_a_result_names_the_folder_the_bits_and_the_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    found = quantize(str(model), tmp_path / "q", bits=8).to_dict()
    assert (found["path"], found["bits"]) == (str(tmp_path / "q"), 8)
    assert 0 < found["error"] <= found["worst_error"] < 0.01
    assert found["worst_module"].startswith("model.layers.")
    with pytest.raises(ModelError, match="already holds something"):
        quantize(str(model), tmp_path / "q")
