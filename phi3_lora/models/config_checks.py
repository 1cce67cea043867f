"""Check the values of config.json and report all problems together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from phi3_lora.models.config import DTYPES, ModelConfig


def contradictions(config: ModelConfig, raw: Mapping[str, Any]) -> list[str]:
    """Return the problems of a model's shape, one phrase each.

    Args:
        config: the parsed values.
        raw: config.json, for values that `config` does not keep.
    """
    problems = [
        f"{name} must be >= 1, got {getattr(config, name)}"
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim"),
        )
        if getattr(config, name) < 1
    ]
    problems = problems or _values_out_of_range(config, raw)
    if problems:
        return problems
    if config.hidden_size % config.num_attention_heads and not raw.get("head_dim"):
        problems.append(
            f"hidden_size {config.hidden_size} is not divisible by "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(
            f"num_attention_heads {config.num_attention_heads} is not divisible by "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    special = [(name, raw.get(name)) for name in ("bos_token_id", "pad_token_id")]
    special += [("eos_token_id", i) for i in sorted(config.stop_ids)]
    problems += [
        f"{name} {value!r} is outside the vocabulary of {config.vocab_size}"
        for name, value in special
        if value is not None and not _is_id(value, config.vocab_size, is_pad=name == "pad_token_id")
    ]
    if config.dtype not in DTYPES:
        problems.append(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} is not silu")
    for name in ("short_factor", "long_factor"):
        factors = getattr(config.rope, name)
        if factors is not None and len(factors) != config.rotary_dim // 2:
            problems.append(
                f"rope {name} has {len(factors)} entries; rotary dimension "
                f"{config.rotary_dim} needs {config.rotary_dim // 2}"
            )
    return problems


def _is_id(value: Any, vocab_size: int, *, is_pad: bool) -> bool:
    """True if a value is a token's id; a pad token of -1 means that there is no pad token."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return (-1 if is_pad else 0) <= value < vocab_size


def _values_out_of_range(config: ModelConfig, raw: Mapping[str, Any]) -> list[str]:
    rope, problems = config.rope, []
    positive = {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope attention_factor": 1.0 if rope.attention_factor is None else rope.attention_factor,
        "rope factor": 1.0 if rope.factor is None else rope.factor,
        "max_position_embeddings": config.max_position_embeddings,
        "original_max_position_embeddings": config.original_max_position_embeddings,
    }
    problems += [
        f"{name} must be a number > 0, got {value}"
        for name, value in positive.items()
        if not 0 < value < math.inf
    ]
    if config.sliding_window is not None and config.sliding_window < 1:
        problems.append(
            f"sliding_window must be null or an integer >= 1, got {config.sliding_window}"
        )
    if not 0 < rope.partial_rotary_factor <= 1 or config.rotary_dim < 2 or config.rotary_dim % 2:
        problems.append(
            f"partial_rotary_factor must be in (0, 1] and rotate an even number of a head's "
            f"{config.head_dim} dimensions, got {rope.partial_rotary_factor}"
        )
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings must be true or false, got {tied!r}")
    return problems
