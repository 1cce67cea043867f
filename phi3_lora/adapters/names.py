"""Tensor names of adapters and which module each belongs to.

Source: PEFT, utils/save_and_load.py; mlx-lm, tuner/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from phi3_lora.errors import ConfigError

PEFT_PREFIX = "base_model.model."
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def lora_a_name(module: str) -> str:
    """PEFT's name of a module's A, (R, in)."""
    return f"{PEFT_PREFIX}{module}.lora_A.weight"


def lora_b_name(module: str) -> str:
    """PEFT's name of a module's B, (out, R)."""
    return f"{PEFT_PREFIX}{module}.lora_B.weight"


def is_b(name: str) -> bool:
    """Whether a tensor is a B; the adapter changes nothing while every B is 0."""
    return name.endswith(".lora_B.weight")


def split_layer(module: str) -> tuple[int, str] | None:
    """Layer number and the path below it, for a module inside a decoder layer."""
    match = _LAYER.match(module)
    return None if match is None else (int(match[1]), match[2])


def resolve_targets(
    targets: str | Sequence[str], available: Mapping[str, tuple[int, int]]
) -> tuple[str, ...]:
    """Full paths of the modules that target_modules means, in model order.

    As in PEFT: a list matches whole paths or their endings, a single string is a regular
    expression over the whole path, all-linear is every linear layer but the head. A list of one
    name and the bare string of that name mean the same here.

    Raises:
        ConfigError: when a name matches nothing; the message lists what exists.
    """
    if targets == "all-linear":
        return tuple(available)
    names = [targets] if isinstance(targets, str) else list(targets)
    if names == ["all-linear"]:
        return tuple(available)
    chosen: set[str] = set()
    unmatched = []
    for name in names:
        found = {m for m in available if m == name or m.endswith(f".{name}")}
        if not found and isinstance(targets, str):
            found = _full_matches(name, available)
        chosen |= found
        if not found:
            unmatched.append(name)
    if unmatched:
        endings = sorted({m.rsplit(".", 1)[-1] for m in available})
        raise ConfigError(
            f"target_modules: {', '.join(map(repr, unmatched))} matches no layer of this model; "
            f"its linear layers are: {', '.join(endings)} (Phi-3 stores q, k, v fused as qkv_proj "
            "and gate, up as gate_up_proj), or use all-linear"
        )
    return tuple(m for m in available if m in chosen)


def _full_matches(pattern: str, available: Mapping[str, tuple[int, int]]) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as cause:
        raise ConfigError(
            f"target_modules {pattern!r} is neither a module name nor a regular expression: {cause}"
        ) from None
    return {m for m in available if compiled.fullmatch(m)}


def short_targets(modules: Sequence[str], num_layers: int | None) -> list[str]:
    """The shortest target_modules list that PEFT resolves to exactly these modules.

    Endings such as qkv_proj when every layer of the base model has them, else (or when the number
    of layers is unknown) the full paths.
    """
    by_ending: dict[str, int] = {}
    for module in modules:
        ending = module.rsplit(".", 1)[-1]
        by_ending[ending] = by_ending.get(ending, 0) + 1
    if all(count == num_layers for count in by_ending.values()):
        return sorted(by_ending)
    return list(modules)
