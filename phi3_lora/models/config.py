"""The shape of a Phi-3 model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from phi3_lora.models.quantization.grid import GROUP_SIZE

PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""The linear layers of a decoder layer; q, k, v and gate, up are stored fused."""
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Quantization = Literal["none", "4bit", "8bit", "nf4", "mlx-affine"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
"""Quantisations of a base model: none, the shared grids, and those of bitsandbytes and MLX."""


def qkv_rows(heads: int, key_value_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Return the rows of q, k and v in the fused projection."""
    key_values = key_value_heads * head_dim
    return heads * head_dim, key_values, key_values


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding, from either style of config."""

    theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float | None = None
    factor: float | None = None
    """LongRoPE's ratio of the long context to the original one; None if config.json has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Phi-3 model's shape."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    original_max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    rope: RopeConfig
    stop_ids: frozenset[int]
    dtype: Dtype
    quantization: Mapping[str, Any] | None
    grid_bits: int | None = None
    """Bits of the shared grid that the linear layers are stored on; None without a shared grid."""

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused projection."""
        return qkv_rows(self.num_attention_heads, self.num_key_value_heads, self.head_dim)

    def answer_stop_ids(self, end_of_turn_id: int | None) -> tuple[int, ...]:
        """Return the ids that end an answer, the template's end of turn first.

        Args:
            end_of_turn_id: the id that ends a turn in the chat template; None if it has none.
        """
        own = () if end_of_turn_id is None else (end_of_turn_id,)
        return (*own, *sorted(self.stop_ids.difference(own)))

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions in each head."""
        return int(self.head_dim * self.rope.partial_rotary_factor)

    @property
    def attention_factor(self) -> float:
        """The factor that multiplies cos and sin in LongRoPE; 1 without LongRoPE.

        Source: transformers, modeling_rope_utils.py, _compute_longrope_parameters.
        """
        if self.rope.long_factor is None:
            return 1.0
        if self.rope.attention_factor is not None:
            return self.rope.attention_factor
        factor = self.rope.factor
        if factor is None:
            factor = self.max_position_embeddings / self.original_max_position_embeddings
        if factor <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(self.original_max_position_embeddings))

    def uses_long_factors(self, length: Any) -> Any:
        """Return whether documents of these lengths (tokens) use LongRoPE's long factors."""
        if self.rope.long_factor is None:
            return np.zeros_like(length, dtype=bool)
        return np.asarray(length) > self.original_max_position_embeddings

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return module path -> (out, in) of each linear layer that LoRA can adapt."""
        qkv = self.qkv_rows
        shape = {
            "self_attn.qkv_proj": (sum(qkv), self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, qkv[0]),
            "mlp.gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }
        return {
            f"model.layers.{i}.{name}": shape[name]
            for i in range(self.num_hidden_layers)
            for name in PROJECTIONS
        }

    def adaptable_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of all adaptable layers, with embedding and head unless they are tied.

        The embedding is (hidden, vocabulary). If it is tied to the head, some tools apply an
        adapter of the one also to the other, and some do not.
        """
        if self.tie_word_embeddings:
            return self.linear_shapes()
        embedding = {"model.embed_tokens": (self.hidden_size, self.vocab_size)}
        return {**embedding, **self.linear_shapes(), "lm_head": (self.vocab_size, self.hidden_size)}

    def grid_shapes(self) -> dict[str, tuple[int, int]]:
        """Return module path -> (out, in) of the layers that a shared grid can store.

        Their number of inputs is a multiple of 32.
        """
        shapes = self.linear_shapes()
        return {module: s for module, s in shapes.items() if s[1] % GROUP_SIZE == 0}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of each parameter in an unquantised model folder."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": hidden,
            **{f"{path}.weight": shape for path, shape in self.linear_shapes().items()},
        }
        for i in range(self.num_hidden_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{i}.{norm}.weight"] = hidden
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes
