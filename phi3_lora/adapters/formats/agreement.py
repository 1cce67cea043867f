"""Comparison of the two adapter files in one folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phi3_lora.adapters.adapter import Adapter, module_of, uniform_pair
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.arrays import Float32
from phi3_lora.errors import AdapterError, listing


def check_agree(folder: Path, first: Adapter, second: Adapter) -> None:
    """Check that PEFT's file and mlx-lm's file in a folder hold the same adapter.

    Args:
        folder: the adapter folder, for the message.
        first: the adapter in PEFT's file.
        second: the adapter in mlx-lm's file.

    Raises:
        AdapterError: one message with every difference.
    """
    problems = []
    if abs(first.scaling - second.scaling) > 1e-6 * abs(first.scaling):
        problems.append(f"scale {first.scaling:g} (PEFT) against {second.scaling:g} (mlx-lm)")
    r = max((a.rank(m) for a in (first, second) for m in a.modules), default=0)
    for name in sorted(set(first.weights) | set(second.weights)):
        a, b = first.weights.get(name), second.weights.get(name)
        if (a is None or b is None) and _is_empty_pair(first if b is None else second, name):
            # mlx-lm's file has pairs of zeros for modules that are not adapted.
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
    """Return a tensor at rank r and the common scale, as mlx-lm's file stores it."""
    module = module_of(name)
    if name == lora_a_name(module):
        return uniform_pair(adapter, module, r)[0]
    if name == lora_b_name(module):
        return uniform_pair(adapter, module, r)[1]
    return adapter.weights[name]
