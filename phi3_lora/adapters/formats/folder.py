"""Adapter folders, which PEFT, vLLM and mlx-lm load without a conversion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.checks import adapter_problems
from phi3_lora.adapters.fingerprint import FINGERPRINT_NAME
from phi3_lora.adapters.formats.agreement import check_agree
from phi3_lora.adapters.formats.config_file import CONFIG_NAME, read_adapter_config
from phi3_lora.adapters.formats.detect import find_layouts
from phi3_lora.adapters.formats.fused import RowNorms, fuse
from phi3_lora.adapters.formats.record import FileFormat
from phi3_lora.adapters.formats.registry import FOLDER_FORMATS, TARGETS
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.atomic import check_folder_unused, replace_folder, write_bytes
from phi3_lora.storage.safetensors import write_streamed

TEMPLATE_NAME = "chat_template.jinja"
"""Name of the chat template of training, if it differs from the model's; transformers' name."""


def read_adapter(
    folder: Path,
    base: ModelConfig | None = None,
    *,
    keep_parts: bool = False,
    row_norms: RowNorms | None = None,
) -> Adapter:
    """Read the adapter in a folder of any format, on fused modules; two files must agree.

    Args:
        folder: the adapter folder.
        base: configuration of the base model; an adapter of separate q, k, v may need it.
        keep_parts: keep separate q, k, v and gate, up separate.
        row_norms: norms of the base's weight rows; DoRA of separate q, k, v may need them.

    Raises:
        AdapterError: when a file is missing, damaged, or contradicts another.
    """
    layouts = find_layouts(folder)
    config = read_adapter_config(folder)
    adapters = []
    try:
        for layout, path in layouts.items():
            adapters.append(FOLDER_FORMATS[layout].read(path, config))
    except AdapterError:
        raise
    except (TypeError, ValueError) as cause:
        raise AdapterError(
            f"{folder}/{CONFIG_NAME} has a value of the wrong type: {cause}"
        ) from None
    for adapter in adapters:
        for alpha in (adapter.lora_alpha, *adapter.alphas.values()):
            if not 0 < alpha < math.inf:
                raise AdapterError(f"{folder}: the scale must be a number > 0, got alpha {alpha}")
        problems = adapter_problems(adapter)
        if problems:
            raise AdapterError(listing(f"the adapter in {folder} is damaged:", problems))
    if not keep_parts:
        adapters = [fuse(adapter, base, row_norms) for adapter in adapters]
    for other in adapters[1:]:
        check_agree(folder, adapters[0], other)
    return adapters[0]


def check_unused(folder: Path) -> None:
    """Make sure that a folder is new or empty.

    Raises:
        AdapterError: when the folder holds files.
    """
    check_folder_unused(folder, AdapterError, "is in use: choose a new or empty folder")


def check_apart(target: Path, *sources: Path) -> None:
    """Make sure that a new folder is not inside one of its sources.

    Raises:
        AdapterError: when it is.
    """
    for source in sources:
        if source.resolve() in target.resolve().parents:
            raise AdapterError(f"{target} is inside {source}: choose a folder elsewhere")


def check_replaceable(folder: Path) -> None:
    """Make sure that writing an adapter here deletes nothing but an older adapter.

    Raises:
        AdapterError: when the folder holds other files than an adapter's.
    """
    if not folder.exists():
        return
    own = {
        CONFIG_NAME,
        "README.md",
        FINGERPRINT_NAME,
        TEMPLATE_NAME,
        *(found.weights_name for found in FOLDER_FORMATS.values()),
    }
    if not folder.is_dir() or any(path.name not in own for path in folder.iterdir()):
        raise AdapterError(f"{folder} holds other files than an adapter: choose a new folder")


def write_adapter_folder(
    folder: Path,
    adapter: Adapter,
    *,
    to: str = "both",
    base: ModelConfig | None = None,
    files: Mapping[str, bytes] | None = None,
) -> list[str]:
    """Write an adapter folder in one move.

    Args:
        folder: the folder to write; an older adapter in it is replaced.
        adapter: the adapter to write.
        to: peft, mlx, both, or unfused (PEFT's format with separate q, k, v and gate, up).
        base: configuration of the base model; unfused needs it.
        files: further files, by name.

    Returns:
        Notes on formats that were left out, with the reason.

    Raises:
        AdapterError: when the only format asked for cannot hold the adapter.
        StorageError: when the folder cannot be written; the old content stays.
    """
    target = TARGETS[to]
    assert not isinstance(target, FileFormat)
    chosen, notes = [], []
    for member in target.members:
        reason = member.refusal(adapter)
        if reason is None:
            chosen.append(member)
            continue
        refused = f"{member.tool} cannot hold this adapter: {reason}"
        if len(target.members) == 1:
            raise AdapterError(refused)
        notes.append(f"no {member.weights_name}: {refused}")
    contents = [(member.weights_name, member.encode(adapter, base)) for member in chosen]

    def fill(part: Path) -> None:
        config: dict[str, Any] = {}
        for weights_name, content in contents:
            write_streamed(part / weights_name, content.tensors)
            config |= content.config
        text = json.dumps(config, indent=2) + "\n"
        write_bytes(part / CONFIG_NAME, text.encode())
        for name, data in (files or {}).items():
            write_bytes(part / name, data)

    replace_folder(folder, fill)
    return notes
