"""Adapters from one layout to another, and how exact that was; numpy only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.folder import (
    FINGERPRINT_NAME,
    find_layouts,
    read_adapter,
    write_adapter_folder,
)
from phi3_lora.errors import AdapterError
from phi3_lora.models import ModelConfig


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did."""

    source: str
    """Layouts found in the source, joined by +."""
    to: str
    tensors: int
    lossless: bool
    max_weight_difference: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The figures under the names of the command's JSON."""
        raw = dataclasses.asdict(self)
        return {"from": raw.pop("source"), **raw}


def convert(
    source: Path, target: Path, *, to: str, config: ModelConfig | None = None
) -> Conversion:
    """Read an adapter of either layout, write it in another, and read the result back.

    Args:
        source: the adapter folder.
        target: a folder that does not exist or is empty.
        to: peft, mlx, both or unfused.
        config: the base model's shape, if known; it makes target_modules short and tells whether
            the adapted layers are the model's last ones. unfused needs it.

    Raises:
        AdapterError: when the source is damaged, the target is in use, or cannot hold it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} is in use: choose a new or empty folder")
    if target.resolve().is_relative_to(source.resolve()):
        raise AdapterError(f"{target} lies inside {source}: choose a folder elsewhere")
    layouts = find_layouts(source)
    adapter = read_adapter(source, config)
    if config is not None:
        adapter = dataclasses.replace(adapter, num_layers=config.num_hidden_layers)
    # What it answered where it was trained holds in every layout.
    kept = [source / name for name in (FINGERPRINT_NAME, "README.md") if (source / name).exists()]
    files = {path.name: path.read_bytes() for path in kept}
    notes = write_adapter_folder(target, adapter, to=to, base=config, files=files)
    if adapter.num_layers is None and to in ("mlx", "both"):
        notes.append(
            "the base model's number of layers is not known, and mlx-lm takes the adapted layers "
            "for its last ones: pass --model to check"
        )
    written = read_adapter(target, config)
    difference = max(
        float(np.abs(value - written.weights[name]).max(initial=0.0))
        for name, value in adapter.weights.items()
    )
    same_scale = abs(written.scaling - adapter.scaling) <= 1e-12 * abs(adapter.scaling)
    return Conversion(
        source="+".join(sorted(layouts)),
        to=to,
        tensors=len(written.weights),
        lossless=difference == 0.0 and same_scale,
        max_weight_difference=difference,
        notes=notes,
    )
