"""loralib's layout: a .pt file of lora_A and lora_B by module path, without rank, scale or config.

Source: microsoft/LoRA, loralib/layers.py (Linear, MergedLinear) and utils.py (lora_state_dict).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from phi3_lora.adapters.adapter import Adapter, with_one_rank
from phi3_lora.adapters.fused import FUSED_PARTS
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.backend import Float32, Tensors
from phi3_lora.errors import AdapterError, listing

_NAME = re.compile(r"^(.+)\.(lora_[AB])$")
_MODULE = re.compile(r"(?:^|\.)(model\.layers\.\d+\..+)$")


@dataclass(frozen=True, slots=True)
class Untold:
    """What the file does not say."""

    alpha: float | None = None
    """lora_alpha; loralib's own default is 1."""
    prefix: str = ""
    """What stands before the module paths of Phi-3."""
    enable: Sequence[str] = ()
    """The parts of a fused projection that MergedLinear adapts, such as q, v."""


def from_loralib(tensors: Mapping[str, Float32], untold: Untold, where: str) -> Adapter:
    """The adapter in a state dict; what is no LoRA tensor (a full state dict) is left aside.

    Raises:
        AdapterError: when alpha is not told, a pair is not whole, or a module is none of Phi-3's.
    """
    if untold.alpha is None:
        raise AdapterError(f"{where}: loralib stores no alpha; pass --alpha, as the layers had it")
    pairs: dict[str, dict[str, Float32]] = {}
    for name, value in tensors.items():
        match = _NAME.match(name)
        if match is not None:
            pairs.setdefault(match[1], {})[match[2]] = value
    problems, found, ranks = [], {}, set()
    for path, pair in pairs.items():
        try:
            a, b = _factors(path, pair, untold.enable)
            found[_module(path, untold.prefix)] = a, b
            ranks.add(pair["lora_B"].shape[1])
        except AdapterError as cause:
            problems.append(str(cause))
    if len(ranks) > 1:
        problems.append(f"ranks {', '.join(map(str, sorted(ranks)))}: one --alpha cannot suit all")
    if problems or not found:
        problems = problems or ["no lora_A and lora_B in it"]
        raise AdapterError(listing(f"{where} cannot be used:", problems))
    return with_one_rank(found, untold.alpha / ranks.pop())


def _module(path: str, prefix: str) -> str:
    match = _MODULE.search(path.removeprefix(prefix))
    if match is None:
        raise AdapterError(
            f"{path}: no module path of Phi-3 (model.layers.N...); pass --prefix if it starts with "
            "a name of your own"
        )
    return match[1]


def _factors(
    path: str, pair: Mapping[str, Float32], enable: Sequence[str]
) -> tuple[Float32, Float32]:
    """A (ranks, in) and B (out, ranks) of Linear, or of MergedLinear."""
    if set(pair) != {"lora_A", "lora_B"}:
        raise AdapterError(f"{path}: {' and '.join(pair)} without its pair")
    a, b = pair["lora_A"], pair["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] < 1 or len(a) % b.shape[1]:
        raise AdapterError(f"{path}: A {a.shape} and B {b.shape} do not belong together")
    count, r = len(a) // b.shape[1], b.shape[1]
    if count == 1:
        return a, b
    fused = next((name for name in FUSED_PARTS if path.endswith(name)), None)
    if fused is None:
        raise AdapterError(f"{path}: {count} parts, but it is no fused projection")
    parts = [part.split(".")[1].removesuffix("_proj") for part in FUSED_PARTS[fused]]
    chosen = [part for part in parts if part in enable] if enable else parts
    if len(chosen) != count:
        raise AdapterError(
            f"{path}: {count} of {', '.join(parts)} are adapted; pass --enable with their names"
        )
    # MergedLinear cuts its output into equal parts, whatever the model's own are.
    rows = len(b) // count
    wide = np.zeros((rows * len(parts), len(a)), np.float32)
    for i, part in enumerate(chosen):
        start = parts.index(part) * rows
        wide[start : start + rows, i * r : (i + 1) * r] = b[i * rows : (i + 1) * rows]
    return a, wide


def to_loralib(adapter: Adapter, prefix: str = "") -> Tensors:
    """The tensors of lora_state_dict of a model with loralib's Linear layers."""
    tensors = {}
    for module in adapter.modules:
        tensors[f"{prefix}{module}.lora_A"] = adapter.weights[lora_a_name(module)]
        tensors[f"{prefix}{module}.lora_B"] = adapter.weights[lora_b_name(module)]
    return tensors
