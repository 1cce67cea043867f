"""The family table: models recognised by shape, and differences in other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.family import FAMILY, FamilyMember, peer_differences, recognise
from tests.tiny import member_config


def true_shape(folder: Path, member: FamilyMember, **changes: Any) -> ModelConfig:
    raw = member_config(member, **changes)
    (folder / "config.json").write_text(json.dumps(raw))
    return read_model_config(folder)


@pytest.mark.parametrize("member", FAMILY, ids=lambda m: m.hub_ids[0])
def test_member_is_recognised_by_its_shape(tmp_path: Path, member: FamilyMember) -> None:
    config = true_shape(tmp_path, member)
    assert recognise(config) is member
    shapes = config.linear_shapes()
    assert shapes["model.layers.0.self_attn.qkv_proj"][0] == sum(member.fused_rows["qkv_proj"])
    assert shapes["model.layers.0.mlp.gate_up_proj"][0] == sum(member.fused_rows["gate_up_proj"])


def test_another_shape_is_no_member(tmp_path: Path) -> None:
    assert recognise(true_shape(tmp_path, FAMILY[0], num_hidden_layers=31)) is None


def test_differences_follow_from_the_config(tmp_path: Path) -> None:
    short, long, _, _, plain, *_ = (true_shape(tmp_path, member) for member in FAMILY)
    assert peer_differences(plain) == {}
    assert peer_differences(short) == {"mlx-lm": "ignores the sliding window of 2,047 tokens"}
    assert set(peer_differences(long)) == {"mlx-lm", "vLLM", "llama.cpp"}
    assert "4,096 tokens" in peer_differences(long)["mlx-lm"]
