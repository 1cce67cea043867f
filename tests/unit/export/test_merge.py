"""Merging: options without effect, and several adapters merged to one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.deltas import Weighted
from phi3_lora.errors import AdapterError, ConfigError
from phi3_lora.export.merge import MergedAdapter, MergeOptions, MergeRequest, merge
from phi3_lora.models.config_json import read_model_config
from tests.tiny import random_adapter, write_model


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"to": "adapter", "dequantize": True}, "apply only to models"),
        ({"to": "gguf", "dtype": "float32"}, "use --outtype"),
        ({"to": "mlx", "out_type": "f16"}, "with --to mlx use --dtype"),
    ],
)
def test_an_option_without_effect_is_refused(options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError, match=phrase):
        MergeOptions(**options)


def test_a_sum_of_adapters_reports_modules_and_ranks(tmp_path: Path) -> None:
    config = read_model_config(write_model(tmp_path / "model"))
    adapter = Adapter(weights=random_adapter(config.linear_shapes(), r=4), r=4, lora_alpha=8.0)
    request = MergeRequest(
        source=tmp_path / "model",
        config=config,
        tensors={},
        parts=[Weighted(adapter, 1.0), Weighted(adapter, 0.5)],
        target=tmp_path / "sum",
        options=MergeOptions(to="adapter"),
    )
    result = merge(request)
    assert isinstance(result, MergedAdapter)
    assert result.to_dict() == {"path": str(tmp_path / "sum"), "modules": 8, "ranks": [8]}
    with pytest.raises(AdapterError, match="is in use"):
        merge(request)
