"""Tensor names of adapters and which module each belongs to.

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
"""Ending -> what the tensor is; the first that fits counts."""


def lora_a_name(module: str) -> str:
    """PEFT's name of a module's A, (R, in); of the embedding (R, vocabulary)."""
    return f"{PEFT_PREFIX}{module}.lora_{'embedding_A' if module == EMBEDDING else 'A.weight'}"


def lora_b_name(module: str) -> str:
    """PEFT's name of a module's B, (out, R); of the embedding (hidden, R)."""
    return f"{PEFT_PREFIX}{module}.lora_{'embedding_B' if module == EMBEDDING else 'B.weight'}"


def magnitude_name(module: str) -> str:
    """PEFT's name of a module's DoRA magnitude, (out,)."""
    return f"{PEFT_PREFIX}{module}.lora_magnitude_vector"


def saved_name(module: str) -> str:
    """PEFT's name of a whole weight that was trained (modules_to_save)."""
    return f"{PEFT_PREFIX}{module}.weight"


def split_name(name: str) -> tuple[str, str] | None:
    """The module of a PEFT name, and whether it is its A, B, m or weight; None if it is foreign."""
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
    """Layer number and the path below it, for a module inside a decoder layer."""
    match = _LAYER.match(module)
    return None if match is None else (int(match[1]), match[2])


def ends_with(module: str, name: str) -> bool:
    """Return whether a name is a module's path or a whole ending of it, as in PEFT's lists."""
    return module == name or module.endswith(f".{name}")


def short_targets(modules: Sequence[str], num_layers: int | None) -> list[str]:
    """The shortest target_modules list that PEFT resolves to exactly these modules.

    Endings such as qkv_proj when every layer of the base model has them, else (or when the number
    of layers is unknown) the full paths.
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
    """Return whether Phi-3 has this module, with q, k, v and gate, up fused or separate."""
    place = split_layer(module)
    return module in (EMBEDDING, HEAD, "model.norm") if place is None else place[1] in _IN_LAYER
