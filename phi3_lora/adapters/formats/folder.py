"""Adapter folders: one folder that PEFT, vLLM and mlx-lm load as it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, adapter_problems, module_of, uniform_pair
from phi3_lora.adapters.formats import mlx_lm as mlx_layout
from phi3_lora.adapters.formats import peft as peft_layout
from phi3_lora.adapters.formats.fused import RowNorms, fuse, is_unfused, unfuse
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.arrays import Float32
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models.config import ModelConfig
from phi3_lora.storage.atomic import check_folder_unused, replace_folder, write_bytes
from phi3_lora.storage.json_file import read_json
from phi3_lora.storage.safetensors import read_header, read_index, write_streamed

CONFIG_NAME = "adapter_config.json"
FINGERPRINT_NAME = "fingerprint.safetensors"
_NUMBERED = re.compile(r"\d{7}_adapters\.safetensors")
"""mlx-lm's checkpoints."""
TEMPLATE_NAME = "chat_template.jinja"
"""Where training had another template than the model's; named as transformers names it."""


def find_layouts(folder: Path) -> dict[str, Path]:
    """Layout name -> weights file, told by the tensors' names and never by a label.

    Raises:
        AdapterError: when the folder does not exist, or holds no adapter weights.
    """
    if not folder.is_dir():
        raise AdapterError(f"no such adapter folder: {folder}")
    found: dict[str, Path] = {}
    index = folder / f"{peft_layout.WEIGHTS_NAME}.index.json"
    shards: set[str] = set()
    if index.exists():
        tensors = read_index(index, AdapterError)
        shards = {info.path.name for info in tensors.values()}
        found[_layout(tensors) or "peft"] = index
    candidates: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == FINGERPRINT_NAME or path.name in shards:
            continue
        layout = _layout(read_header(path, AdapterError))
        if layout is not None:
            candidates.setdefault(layout, []).append(path)
    for layout, paths in candidates.items():
        found.setdefault(layout, _newest(folder, layout, paths))
    if not found:
        raise AdapterError(
            f"{folder} holds no adapter: expected {peft_layout.WEIGHTS_NAME} (PEFT) or "
            f"{mlx_layout.WEIGHTS_NAME} (mlx-lm) with LoRA tensors"
        )
    return found


def _newest(folder: Path, layout: str, paths: list[Path]) -> Path:
    """The file of a layout: the usual one, else the last of mlx-lm's numbered checkpoints.

    Raises:
        AdapterError: when there are others beside it.
    """
    usual = mlx_layout.WEIGHTS_NAME if layout == "mlx" else peft_layout.WEIGHTS_NAME
    others = [p for p in paths if p.name != usual and not _NUMBERED.fullmatch(p.name)]
    final = [p for p in paths if p.name == usual]
    if len(others) + len(final) > 1:
        names = ", ".join(p.name for p in (*final, *others))
        raise AdapterError(
            f"{folder} holds several adapters ({names}): leave the one that you mean"
        )
    return (final or others or paths)[-1]


def _layout(names: Mapping[str, Any]) -> str | None:
    if is_unfused(names):
        return "unfused"
    if peft_layout.is_peft(names):
        return "peft"
    return "mlx" if mlx_layout.is_mlx(names) else None


def read_adapter(
    folder: Path,
    base: ModelConfig | None = None,
    *,
    keep_parts: bool = False,
    row_norms: RowNorms | None = None,
) -> Adapter:
    """The adapter in a folder of any layout, on fused modules; with two files, they must agree.

    Args:
        folder: of the adapter.
        base: the base model's shape, which an adapter of separate q, k, v may need.
        keep_parts: leave q, k, v and gate, up apart where they are.
        row_norms: of the base's weights, which DoRA of separate q, k, v may need.

    Raises:
        AdapterError: when a file is missing, damaged, or contradicts another.
    """
    layouts = find_layouts(folder)
    config = read_adapter_config(folder)
    adapters = []
    try:
        for layout, path in layouts.items():
            read = mlx_layout.read_mlx if layout == "mlx" else peft_layout.read_peft
            adapters.append(read(path, config))
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
        _check_agree(folder, adapters[0], other)
    return adapters[0]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        AdapterError: when it is missing or is no JSON object.
    """
    return read_json(folder / CONFIG_NAME, AdapterError)


def _check_agree(folder: Path, first: Adapter, second: Adapter) -> None:
    problems = []
    if abs(first.scaling - second.scaling) > 1e-6 * abs(first.scaling):
        problems.append(f"scale {first.scaling:g} (PEFT) against {second.scaling:g} (mlx-lm)")
    r = max((a.rank(m) for a in (first, second) for m in a.modules), default=0)
    for name in sorted(set(first.weights) | set(second.weights)):
        a, b = first.weights.get(name), second.weights.get(name)
        if (a is None or b is None) and _is_empty_pair(first if b is None else second, name):
            # A pair of zeros fills mlx-lm's layers up and is dropped in reading.
            continue
        if a is None or b is None:
            problems.append(f"{name}: only in the {'mlx-lm' if a is None else 'PEFT'} file")
        elif not np.array_equal(_as_uniform(first, name, r), _as_uniform(second, name, r)):
            problems.append(f"{name}: different values")
    if problems:
        problems.append("delete the file that you do not trust")
        raise AdapterError(listing(f"the two adapter files in {folder} disagree:", problems))


def _is_empty_pair(adapter: Adapter, name: str) -> bool:
    module = module_of(name)
    return module in adapter.modules and not any(value.any() for value in adapter.pair(module))


def _as_uniform(adapter: Adapter, name: str, r: int) -> Float32:
    """A tensor in one rank and scale for all: mlx-lm's file holds no other, PEFT's may."""
    module = module_of(name)
    if name == lora_a_name(module):
        return uniform_pair(adapter, module, r)[0]
    if name == lora_b_name(module):
        return uniform_pair(adapter, module, r)[1]
    return adapter.weights[name]


def check_unused(folder: Path) -> None:
    """Make sure that a folder is new or empty.

    Raises:
        AdapterError: when it is not.
    """
    check_folder_unused(folder, AdapterError, "is in use: choose a new or empty folder")


def check_apart(target: Path, *sources: Path) -> None:
    """Make sure that a new folder does not lie inside what it is made from.

    Raises:
        AdapterError: when it does.
    """
    for source in sources:
        if source.resolve() in target.resolve().parents:
            raise AdapterError(f"{target} lies inside {source}: choose a folder elsewhere")


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
        peft_layout.WEIGHTS_NAME,
        mlx_layout.WEIGHTS_NAME,
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
        folder: where; an older adapter there is replaced.
        adapter: what.
        to: peft, mlx, both, or unfused (PEFT's layout with q, k, v and gate, up on their own).
        base: the base model's shape, which unfused needs.
        files: further files, by name.

    Returns:
        Notes: which layout was left out and why.

    Raises:
        AdapterError: when the only layout asked for cannot hold the adapter.
        StorageError: when the folder cannot be written; the old content stays.
    """
    if to == "unfused":
        if base is None:
            raise AdapterError("unfused needs the sizes of q, k and v: pass --model")
        adapter, to = unfuse(adapter, base), "peft"
    layouts = ("peft", "mlx") if to == "both" else (to,)
    notes = []
    reason = mlx_layout.why_not_mlx(adapter) if "mlx" in layouts else None
    if reason is not None:
        if to == "mlx":
            raise AdapterError(f"mlx-lm cannot hold this adapter: {reason}")
        layouts = ("peft",)
        notes.append(f"no {mlx_layout.WEIGHTS_NAME}: mlx-lm cannot hold this adapter: {reason}")

    def fill(part: Path) -> None:
        config: dict[str, Any] = {}
        if "peft" in layouts:
            write_streamed(part / peft_layout.WEIGHTS_NAME, peft_layout.peft_tensors(adapter))
            config |= peft_layout.peft_config(adapter)
        if "mlx" in layouts:
            tail = mlx_layout.for_mlx(adapter)
            write_streamed(part / mlx_layout.WEIGHTS_NAME, mlx_layout.mlx_tensors(tail))
            config |= mlx_layout.mlx_config(tail)
        text = json.dumps(config, indent=2) + "\n"
        write_bytes(part / CONFIG_NAME, text.encode())
        for name, content in (files or {}).items():
            write_bytes(part / name, content)

    replace_folder(folder, fill)
    return notes
