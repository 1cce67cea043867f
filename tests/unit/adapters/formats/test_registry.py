"""The table of adapter formats."""

from __future__ import annotations

from phi3_lora.adapters.formats.registry import FILE_FORMATS, FOLDER_FORMATS, TARGETS
from phi3_lora.adapters.formats.tools import CONSUMERS


def test_targets_are_the_formats_that_can_be_written_in_the_order_of_the_help() -> None:
    assert list(TARGETS) == ["peft", "mlx", "both", "unfused", "loralib", "gguf"]


def test_at_most_one_folder_format_accepts_a_files_tensor_names() -> None:
    module = "base_model.model.model.layers.0.self_attn"
    found = {
        name: [f.name for f in FOLDER_FORMATS.values() if f.detect({name: None})]
        for name in (
            f"{module}.qkv_proj.lora_A.weight",
            f"{module}.q_proj.lora_A.weight",
            "x.lora_a",
        )
    }
    assert list(found.values()) == [["peft"], ["unfused"], ["mlx"]]


def test_every_tool_reads_a_format_of_the_table() -> None:
    assert {tool.layout for tool in CONSUMERS.values()} <= {*FOLDER_FORMATS, *FILE_FORMATS}
