"""Phi-3's forward pass in MLX, for documents laid end to end and for cached decoding.

Shape letters: T tokens, H heads, D head size. Modules have the names of the safetensors files.
Source: transformers, modeling_phi3.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from phi3_lora.models.config import ModelConfig
from phi3_lora_mlx.attention import Attention, attend
from phi3_lora_mlx.numerics import on_cpu, staged_sum


class Angles(NamedTuple):
    """cos and sin of each token's rotary angles, each (T, rotary_dim / 2) float32."""

    cos: mx.array
    sin: mx.array


Caches = Sequence[KVCache] | None
"""A layer's key-value caches, one for each document."""


def rotate(x: mx.array, angles: Angles) -> mx.array:
    """Apply the rotary embedding to x (H, T, D); dimensions from rotary_dim on do not change.

    Source: RoFormer, arXiv 2104.09864, equation 34, in the half-split order of transformers.
    """
    half = angles.cos.shape[-1]
    cos, sin = angles.cos.astype(x.dtype), angles.sin.astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


class RMSNorm(nn.RMSNorm):
    """MLX's RMSNorm; on a CPU, the mean of squares is summed in stages."""

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise and scale x (..., hidden)."""
        if not on_cpu():
            return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)
        exact = x.astype(mx.float32)
        mean = staged_sum(exact**2)[..., None] / x.shape[-1]
        return self.weight.astype(x.dtype) * (exact * mx.rsqrt(mean + self.eps)).astype(x.dtype)


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's layer; on a CPU its weight is made dense, because MLX's kernel is 60 times slower."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out)."""
        if not on_cpu():
            return super().__call__(x)
        return x @ dequantized(self).astype(x.dtype).T


def dequantized(layer: nn.QuantizedLinear) -> mx.array:
    """Return the weight (out, in) of a quantised layer, in the dtype of its scales."""
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


class Linear(nn.Linear):
    """MLX's layer without a bias; mlx.nn.quantize turns it into our QuantizedLinear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out); the weight is cast, as a trained weight is float32."""
        return x @ self.weight.astype(x.dtype).T

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> nn.Module:
        """Return the layer by which mlx.nn.quantize replaces this one."""
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class Embedding(nn.Embedding):
    """MLX's layer; its output keeps compute_dtype when the weight trains in float32."""

    compute_dtype: mx.Dtype | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """Map tokens (T,) to (T, hidden)."""
        y = super().__call__(x)
        return y if self.compute_dtype is None else y.astype(self.compute_dtype)


class SelfAttention(nn.Module):
    """Attention with fused q, k, v and grouped key-value heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        qkv = config.qkv_rows
        self.qkv_proj = Linear(config.hidden_size, sum(qkv))
        self.o_proj = Linear(qkv[0], config.hidden_size)

    def __call__(
        self, x: mx.array, angles: Angles, attention: Attention, caches: Caches
    ) -> mx.array:
        """Map x (T, hidden) to (T, hidden)."""
        config, length = self._config, x.shape[0]
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        # (T, heads of q, k and v, D) to (heads of q, k and v, T, D).
        qkv = self.qkv_proj(x).reshape(length, queries + 2 * keys, config.head_dim).swapaxes(0, 1)
        q = rotate(qkv[:queries], angles)
        k = rotate(qkv[queries : queries + keys], angles)
        v = qkv[queries + keys :]
        scale = config.head_dim**-0.5
        window = config.sliding_window
        out = attend(q, k, v, attention=attention, scale=scale, window=window, caches=caches)
        return self.o_proj(out.swapaxes(0, 1).reshape(length, -1))


class MLP(nn.Module):
    """SwiGLU with fused gate and up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (T, hidden) to (T, hidden)."""
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(up * nn.silu(gate))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, angles: Angles, attention: Attention, caches: Caches
    ) -> mx.array:
        """Map x (T, hidden) to (T, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), angles, attention, caches)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm: `model.*` in the files."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Phi3(nn.Module):
    """Phi3ForCausalLM."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._is_tied = config.tie_word_embeddings
        self._checkpointed = False
        self.model = Decoder(config)
        if not self._is_tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def __call__(
        self,
        tokens: mx.array,
        angles: Angles,
        attention: Attention,
        caches: Sequence[Sequence[KVCache]] | None = None,
    ) -> mx.array:
        """Compute the final hidden states (T, hidden) of tokens (T,).

        Args:
            tokens: ids, (T,).
            angles: rotary angles of the tokens.
            attention: the documents.
            caches: for each layer, one cache per document; None in training.
        """
        x = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            if self._checkpointed and caches is None:
                x = _checkpointed(layer, x, angles, attention)
            else:
                x = layer(x, angles, attention, None if caches is None else caches[i])
        return self.model.norm(x)

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        self._checkpointed = True

    def head(self, hidden: mx.array) -> mx.array:
        """Map hidden states (S, hidden) to logits (S, vocabulary)."""
        if self._is_tied:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop tensors that are not parameters: rotary buffers and the copy of a tied head."""
        return {
            name: value
            for name, value in weights.items()
            if not name.endswith("inv_freq") and not (self._is_tied and name.startswith("lm_head."))
        }


def _checkpointed(
    layer: DecoderLayer, x: mx.array, angles: Angles, attention: Attention
) -> mx.array:
    """Run a layer whose activations are recomputed; its trainable arrays become inputs."""

    def run(parameters: dict[str, Any], x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, angles, attention, None)

    return mx.checkpoint(run)(layer.trainable_parameters(), x)
