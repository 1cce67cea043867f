"""A report on an adapter, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleReport:
    """Rank, effective scale and Frobenius norm of the delta of one module."""

    r: int
    scale: float
    delta_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterReport:
    """The facts about an adapter that inspect shows."""

    path: Path
    layouts: frozenset[str]
    """Names of the formats that the adapter was found in."""
    adapter: Adapter
    modules: Mapping[str, ModuleReport]

    @property
    def delta_norms(self) -> dict[str, float]:
        """Frobenius norm of each module's delta."""
        return {module: report.delta_norm for module, report in self.modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the report under the names of the command's JSON."""
        adapter = self.adapter
        places = [place for place in map(split_layer, adapter.modules) if place is not None]
        return {
            "path": str(self.path),
            "layout": "+".join(sorted(self.layouts)),
            "base_model": adapter.base_model,
            "r": adapter.r,
            "lora_alpha": adapter.lora_alpha,
            "use_rslora": adapter.use_rslora,
            "use_dora": adapter.use_dora,
            "effective_scale": adapter.scaling,
            "is_uniform": adapter.is_uniform,
            "num_parameters": int(sum(value.size for value in adapter.weights.values())),
            "target_modules": sorted({path for _, path in places}),
            "outside_layers": [m for m in adapter.modules if split_layer(m) is None],
            "saved_modules": list(adapter.saved),
            "layers": sorted({layer for layer, _ in places}),
            "modules": {module: asdict(report) for module, report in self.modules.items()},
            "delta_norms": self.delta_norms,
            "no_op_modules": [m for m, norm in self.delta_norms.items() if norm == 0.0],
            "loads_in": {"phi3-lora": "yes"}
            | {name: faults_of(name, adapter, set(self.layouts)) for name in CONSUMERS},
            "notes": list(adapter.notes),
        }


def inspect_adapter(
    path: Path, missing: MissingMetadata | None = None, config: ModelConfig | None = None
) -> AdapterReport:
    """Report the format, ranks, scales, targets, layers and delta norms of an adapter.

    A norm with DoRA is the norm of scaling B A, without the magnitudes.

    Args:
        path: a folder or file of any format.
        missing: values that a .pt or .npz does not store.
        config: the base model's shape, which parts of a fused weight in a .pt may need.

    Raises:
        AdapterError: when the adapter is damaged.
    """
    if find_adapter_file(path) is None:
        layouts = set(find_layouts(path))
        adapter = read_adapter(path, keep_parts=True)
    else:
        adapter, layout = read_source(path, config, missing or MissingMetadata())
        layouts = {layout}
    modules = {
        module: ModuleReport(
            r=adapter.rank(module),
            scale=adapter.scaling_of(module),
            delta_norm=delta_norm(adapter, module),
        )
        for module in adapter.modules
    }
    return AdapterReport(path=path, layouts=frozenset(layouts), adapter=adapter, modules=modules)
