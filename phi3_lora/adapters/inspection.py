"""What an adapter holds, for people and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.folder import find_layouts, read_adapter
from phi3_lora.adapters.mlx_layout import why_not_mlx
from phi3_lora.adapters.names import lora_a_name, lora_b_name, split_layer


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
        "loads_in": _loads_in(adapter, layouts),
    }


def delta_norm(adapter: Adapter, module: str) -> float:
    """Frobenius norm of scaling B A, from the r x r Gram matrices of A and B.

    ||B A||_F^2 = trace(A A^T B^T B): no (out, in) matrix is made.
    """
    a = adapter.weights[lora_a_name(module)].astype(np.float64)
    b = adapter.weights[lora_b_name(module)].astype(np.float64)
    return float(adapter.scaling * np.sqrt(max(0.0, float(np.sum((a @ a.T) * (b.T @ b).T)))))


def _loads_in(adapter: Adapter, layouts: dict[str, Path]) -> dict[str, str]:
    """Tool -> yes, or what stands in the way."""
    if "unfused" in layouts:
        convert = "no: phi3-lora convert --to both --model BASE"
        peft = "yes, on a base that keeps q, k, v and gate, up apart"
        return {"phi3-lora": "yes", "peft": peft, "mlx-lm": convert}
    mlx_reason = why_not_mlx(adapter)
    needs = "phi3-lora convert --to {}"
    peft = "yes" if "peft" in layouts else needs.format("peft")
    mlx = "yes" if "mlx" in layouts else f"no: {mlx_reason}" if mlx_reason else needs.format("mlx")
    return {"phi3-lora": "yes", "peft": peft, "mlx-lm": mlx}
