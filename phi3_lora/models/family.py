"""The Phi-3 family: one record for each published model, and differences in other tools.

A model folder needs no record: its config.json is enough. The records serve documentation and
tests, and give a model's name for its shape.

Source: each model's config.json, generation_config.json and tokenizer_config.json on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phi3_lora.models.config import ModelConfig, qkv_rows

_PHI3_STOPS = ("<|endoftext|>", "<|end|>")
_PHI4_STOPS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyMember:
    """A published model."""

    hub_ids: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    context: int
    """max_position_embeddings, in tokens."""
    original_context: int
    """Length in tokens above which LongRoPE uses its long factors; context without LongRoPE."""
    sliding_window: int | None = None
    """Window in tokens; None if it is absent or as long as the context."""
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    template: str = "phi3"
    """phi3: <|user|> ... <|end|>. phi4: <|im_start|>user<|im_sep|> ... <|im_end|>."""
    stop_tokens: tuple[str, ...] = _PHI3_STOPS
    pad_token: str = "<|endoftext|>"

    @property
    def rope(self) -> str:
        """Type of the rotary embedding: longrope or default."""
        return "longrope" if self.original_context < self.context else "default"

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of each part in the fused projections: q, k, v and gate, up."""
        heads = self.num_attention_heads
        return {
            "qkv_proj": qkv_rows(heads, self.num_key_value_heads, self.head_dim),
            "gate_up_proj": (self.intermediate_size, self.intermediate_size),
        }


_MINI: dict[str, Any] = {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
_MEDIUM: dict[str, Any] = {
    "vocab_size": 32_064,
    "hidden_size": 5120,
    "intermediate_size": 17_920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}
_PHI4: dict[str, Any] = {
    **_MEDIUM,
    "vocab_size": 100_352,
    "template": "phi4",
    "stop_tokens": _PHI4_STOPS,
}
_SHORT: dict[str, Any] = {"context": 4096, "original_context": 4096, "sliding_window": 2047}
_LONG: dict[str, Any] = {"context": 131_072, "original_context": 4096}

FAMILY = (
    FamilyMember(hub_ids=("microsoft/Phi-3-mini-4k-instruct",), **_MINI, **_SHORT),
    FamilyMember(
        hub_ids=("microsoft/Phi-3-mini-128k-instruct", "microsoft/Phi-3.5-mini-instruct"),
        **_MINI,
        **_LONG,
    ),
    FamilyMember(hub_ids=("microsoft/Phi-3-medium-4k-instruct",), **_MEDIUM, **_SHORT),
    FamilyMember(hub_ids=("microsoft/Phi-3-medium-128k-instruct",), **_MEDIUM, **_LONG),
    FamilyMember(
        hub_ids=("microsoft/phi-4",),
        **_PHI4,
        context=16_384,
        original_context=16_384,
        rope_theta=250_000.0,
        pad_token="<|dummy_87|>",
    ),
    FamilyMember(
        hub_ids=("microsoft/Phi-4-reasoning", "microsoft/Phi-4-reasoning-plus"),
        **_PHI4,
        context=32_768,
        original_context=32_768,
        rope_theta=500_000.0,
        pad_token="<|dummy_85|>",
    ),
    FamilyMember(
        hub_ids=("microsoft/Phi-4-mini-instruct", "microsoft/Phi-4-mini-reasoning"),
        **{**_MINI, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200_064},
        **_LONG,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
    ),
)


def recognise(config: ModelConfig) -> FamilyMember | None:
    """Return the published model that has this shape, or None."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
    )
    for member in FAMILY:
        same_shape = all(getattr(config, n) == getattr(member, n) for n in names)
        if same_shape and config.max_position_embeddings == member.context:
            return member
    return None


def peer_differences(config: ModelConfig) -> dict[str, str]:
    """Return, for each tool, the differences from transformers for this config.json.

    Source: mlx-lm, models/phi3.py and rope_utils.py; vLLM, Phi3LongRoPEScaledRotaryEmbedding;
    llama.cpp, conversion of Phi-3.
    """
    found: dict[str, list[str]] = {"mlx-lm": [], "vLLM": [], "llama.cpp": []}
    boundary = f"{config.original_max_position_embeddings:,} tokens"
    if config.rope.long_factor is not None:
        found["mlx-lm"].append(f"uses LongRoPE's long factors also up to {boundary}")
        found["vLLM"].append(
            f"uses LongRoPE's long factors for every request if max_model_len is over {boundary}"
        )
        found["llama.cpp"].append("chooses LongRoPE's factors by the context size it is given")
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        found["mlx-lm"].append(f"ignores the sliding window of {window:,} tokens")
    return {tool: "; ".join(texts) for tool, texts in found.items() if texts}
