"""Tensor names of adapters, and the module that each name belongs to.

Source: PEFT, utils/save_and_load.py; mlx-lm, tuner/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEFT_PREFIX = "base_model.model."
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
_LAYER = re.compile(r"^model\.layers\.(0|[1-9]\d{0,3})\.(.+)$")
_KINDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "m",
    ".weight": "weight",
}
"""Ending of a name -> kind of the tensor; the first ending that fits counts."""


def lora_a_name(module: str) -> str:
    """Return PEFT's name of a module's A, (R, in); (R, vocabulary) for the embedding."""
    return f"{PEFT_PREFIX}{module}.lora_{'embedding_A' if module == EMBEDDING else 'A.weight'}"


def lora_b_name(module: str) -> str:
    """Return PEFT's name of a module's B, (out, R); (hidden, R) for the embedding."""
    return f"{PEFT_PREFIX}{module}.lora_{'embedding_B' if module == EMBEDDING else 'B.weight'}"


def magnitude_name(module: str) -> str:
    """Return PEFT's name of a module's DoRA magnitude, (out,)."""
    return f"{PEFT_PREFIX}{module}.lora_magnitude_vector"


def saved_name(module: str) -> str:
    """Return PEFT's name of a whole weight that was trained (modules_to_save)."""
    return f"{PEFT_PREFIX}{module}.weight"


def split_name(name: str) -> tuple[str, str] | None:
    """Split a PEFT name into module and kind (A, B, m, weight); None for any other name."""
    if not name.startswith(PEFT_PREFIX):
        return None
    for ending, kind in _KINDS.items():
        if name.endswith(ending):
            return name[len(PEFT_PREFIX) : -len(ending)], kind
    return None


def is_b(name: str) -> bool:
    """Return whether a tensor is the B of a pair."""
    return name.endswith((".lora_B.weight", ".lora_embedding_B"))


def split_layer(module: str) -> tuple[int, str] | None:
    """Split a module path into layer number and path in the layer; None outside the layers."""
    match = _LAYER.match(module)
    return None if match is None else (int(match[1]), match[2])


def ends_with(module: str, name: str) -> bool:
    """Return whether a name is a module's path or its last parts, as in PEFT's lists."""
    return module == name or module.endswith(f".{name}")


def short_targets(modules: Sequence[str], num_layers: int | None) -> list[str]:
    """Return the shortest target_modules list that PEFT resolves to exactly these modules.

    The list holds endings, such as qkv_proj, if every layer has them. Otherwise, or if num_layers
    is None, it holds full paths.
    """
    by_ending: dict[str, int] = {}
    for module in modules:
        ending = module.rsplit(".", 1)[-1]
        by_ending[ending] = by_ending.get(ending, 0) + 1
    inside = {ending: n for ending, n in by_ending.items() if ending not in (EMBEDDING[6:], HEAD)}
    if all(count == num_layers for count in inside.values()):
        return sorted(by_ending)
    return list(modules)


_IN_LAYER = frozenset(
    {
        *("self_attn.qkv_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("self_attn.o_proj", "mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
        *("mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
    }
)


def is_of_phi3(module: str) -> bool:
    """Return whether Phi-3, fused or with separate q, k, v and gate, up, has a module."""
    place = split_layer(module)
    return module in (EMBEDDING, HEAD, "model.norm") if place is None else place[1] in _IN_LAYER
