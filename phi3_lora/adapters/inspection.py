"""What an adapter holds, for people and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_lora.adapters.consumers import CONSUMERS, faults_of
from phi3_lora.adapters.deltas import delta_norm
from phi3_lora.adapters.folder import find_layouts, read_adapter
from phi3_lora.adapters.names import split_layer


def inspect_adapter(folder: Path) -> dict[str, Any]:
    """Layout, rank, effective scale, targets, layers and the norm of each delta.

    Raises:
        AdapterError: when it is damaged.
    """
    layouts = find_layouts(folder)
    adapter = read_adapter(folder, keep_parts=True)
    norms = {module: delta_norm(adapter, module) for module in adapter.modules}
    places = [place for place in map(split_layer, adapter.modules) if place is not None]
    return {
        "path": str(folder),
        "layout": "+".join(sorted(layouts)),
        "base_model": adapter.base_model,
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "use_rslora": adapter.use_rslora,
        "effective_scale": adapter.scaling,
        "num_parameters": int(sum(value.size for value in adapter.weights.values())),
        "target_modules": sorted({path for _, path in places}),
        "layers": sorted({layer for layer, _ in places}),
        "delta_norms": norms,
        "no_op_modules": [module for module, norm in norms.items() if norm == 0.0],
        "loads_in": {"phi3-lora": "yes"}
        | {name: faults_of(name, adapter, set(layouts)) for name in CONSUMERS},
    }
