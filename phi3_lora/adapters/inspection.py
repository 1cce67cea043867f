"""What an adapter holds, for people and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.deltas import delta_norm
from phi3_lora.adapters.formats.detect import find_adapter_file, find_layouts
from phi3_lora.adapters.formats.folder import read_adapter
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.reading import read_source
from phi3_lora.adapters.formats.tools import CONSUMERS, faults_of
from phi3_lora.adapters.names import split_layer
from phi3_lora.models.config import ModelConfig


def inspect_adapter(
    path: Path, missing: MissingMetadata | None = None, config: ModelConfig | None = None
) -> dict[str, Any]:
    """Layout, ranks, effective scales, targets, layers and the norm of each delta.

    With DoRA a norm is that of scaling B A, without the magnitudes.

    Args:
        path: a folder or file of any layout.
        missing: values that a .pt or .npz does not store.
        config: the base model's shape, which parts of a fused weight in a .pt may need.

    Raises:
        AdapterError: when it is damaged.
    """
    if find_adapter_file(path) is None:
        layouts = set(find_layouts(path))
        adapter = read_adapter(path, keep_parts=True)
    else:
        adapter, layout = read_source(path, config, missing or MissingMetadata())
        layouts = {layout}
    modules = {
        module: {
            "r": adapter.rank(module),
            "scale": adapter.scaling_of(module),
            "delta_norm": delta_norm(adapter, module),
        }
        for module in adapter.modules
    }
    places = [place for place in map(split_layer, adapter.modules) if place is not None]
    return {
        "path": str(path),
        "layout": "+".join(sorted(layouts)),
        **_configuration(adapter),
        "num_parameters": int(sum(value.size for value in adapter.weights.values())),
        "target_modules": sorted({path for _, path in places}),
        "outside_layers": [m for m in adapter.modules if split_layer(m) is None],
        "saved_modules": list(adapter.saved),
        "layers": sorted({layer for layer, _ in places}),
        "modules": modules,
        "delta_norms": {module: facts["delta_norm"] for module, facts in modules.items()},
        "no_op_modules": [m for m, facts in modules.items() if facts["delta_norm"] == 0.0],
        "loads_in": {"phi3-lora": "yes"}
        | {name: faults_of(name, adapter, layouts) for name in CONSUMERS},
        "notes": list(adapter.notes),
    }


def _configuration(adapter: Adapter) -> dict[str, Any]:
    return {
        "base_model": adapter.base_model,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "effective_scale": adapter.scaling,
        "is_uniform": adapter.is_uniform,
    }
