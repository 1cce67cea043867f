"""Adapters from one layout to another, and how exact that was; numpy only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter, pair_problems
from phi3_lora.adapters.folder import (
    FINGERPRINT_NAME,
    check_unused,
    find_layouts,
    read_adapter,
    write_adapter_folder,
)
from phi3_lora.adapters.loralib_layout import Untold, from_loralib, to_loralib
from phi3_lora.adapters.torch_file import encode_torch_file, read_torch_file
from phi3_lora.errors import AdapterError, listing
from phi3_lora.models import ModelConfig
from phi3_lora.storage import explained, replace_file


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
    source: Path,
    target: Path,
    *,
    to: str,
    config: ModelConfig | None = None,
    untold: Untold | None = None,
) -> Conversion:
    """Read an adapter of any layout, write it in another, and read the result back.

    Args:
        source: the adapter folder, or a .pt file of loralib.
        target: a folder that does not exist or is empty; for loralib, a new file.
        to: peft, mlx, both, unfused or loralib.
        config: the base model's shape, if known; it makes target_modules short and tells whether
            the adapted layers are the model's last ones. unfused needs it.
        untold: what a file of loralib does not say.

    Raises:
        AdapterError: when the source is damaged, the target is in use, or cannot hold it.
    """
    untold = untold or Untold()
    _check_target(source, target, is_file=to == "loralib")
    adapter, layouts = _read(source, config, untold)
    if config is not None:
        adapter = dataclasses.replace(adapter, num_layers=config.num_hidden_layers)
    notes = _write(adapter, source, target, to, config, untold)
    told = dataclasses.replace(untold, alpha=adapter.scaling * adapter.r, enable=())
    written, _ = _read(target, config, told)
    difference = max(
        float(np.abs(value - written.weights[name]).max(initial=0.0))
        for name, value in adapter.weights.items()
    )
    same_scale = abs(written.scaling - adapter.scaling) <= 1e-12 * abs(adapter.scaling)
    return Conversion(
        source=layouts,
        to=to,
        tensors=len(written.weights),
        lossless=difference == 0.0 and same_scale,
        max_weight_difference=difference,
        notes=notes,
    )


def _check_target(source: Path, target: Path, *, is_file: bool) -> None:
    if is_file:
        if target.exists():
            raise AdapterError(f"{target} exists already: choose a new file")
        return
    check_unused(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise AdapterError(f"{target} lies inside {source}: choose a folder elsewhere")


def _read(path: Path, config: ModelConfig | None, untold: Untold) -> tuple[Adapter, str]:
    """An adapter, and the names of its layouts joined by +."""
    if path.is_file():
        adapter = from_loralib(read_torch_file(path), untold, str(path))
        problems = pair_problems(adapter.weights, adapter.r)
        if problems:
            raise AdapterError(listing(f"the adapter in {path} is damaged:", problems))
        return adapter, "loralib"
    layouts = "+".join(sorted(find_layouts(path)))
    return read_adapter(path, config), layouts


def _write(
    adapter: Adapter,
    source: Path,
    target: Path,
    to: str,
    config: ModelConfig | None,
    untold: Untold,
) -> list[str]:
    """Write the target; returns what the user should know."""
    if to == "loralib":
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, encode_torch_file(to_loralib(adapter, untold.prefix)))
        return [
            f"loralib stores neither rank nor alpha: r is {adapter.r}, lora_alpha "
            f"{adapter.scaling * adapter.r:g}"
        ]
    # What it answered where it was trained holds in every layout.
    names = (FINGERPRINT_NAME, "README.md")
    files = {n: (source / n).read_bytes() for n in names if (source / n).exists()}
    notes = write_adapter_folder(target, adapter, to=to, base=config, files=files)
    if adapter.num_layers is None and to in ("mlx", "both"):
        notes.append(
            "the base model's number of layers is not known, and mlx-lm takes the adapted layers "
            "for its last ones: pass --model to check"
        )
    return notes
