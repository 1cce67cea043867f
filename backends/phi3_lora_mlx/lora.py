"""LoRA layers in MLX, on plain and quantised linear layers."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from phi3_lora.engine.dropout import MULTIPLIERS, feature_keys, module_key, threshold
from phi3_lora_mlx.numerics import staged_sum
from phi3_lora_mlx.phi3 import dequantized


class LoraState:
    """State that the LoRA layers of a model share; the engine sets it between calls."""

    def __init__(self) -> None:
        self.is_enabled = True
        self.is_tracing = False
        """True while arrays are placeholders of a traced function; layers must not keep them."""
        self.dropout_rows: mx.array | None = None
        """Dropout keys of the current pass, (T,) uint32; None turns dropout off."""


class LoRALinear(nn.Module):
    """y = W x + scaling B A x, with only A and B trainable.

    lora_a is (in, r) and lora_b is (r, out), as in mlx-lm. PEFT has their transposes.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """

    def __init__(
        self,
        linear: nn.Linear | nn.QuantizedLinear,
        *,
        module: str,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        use_dora: bool = False,
        state: LoraState | None = None,
    ) -> None:
        super().__init__()
        out_features, in_features = linear_shape(linear)
        self.linear = linear
        self.lora_a = mx.zeros((in_features, r))
        self.lora_b = mx.zeros((r, out_features))
        if use_dora:
            self.m = mx.ones(out_features)
            self._base_squares = staged_sum(dense_weight(linear) ** 2)
            mx.eval(self._base_squares)
        self._use_dora = use_dora
        self._norms: tuple[mx.array, mx.array, mx.array] | None = None
        self._module_key = module_key(module)
        self._scaling = scaling
        self._dropout = dropout
        # In a tuple, because mlx.nn would treat a bare attribute as a child or a parameter.
        self._shared = (state or LoraState(),)
        self.freeze()
        self.unfreeze(keys=["lora_a", "lora_b", *(["m"] if use_dora else [])], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x (..., in) to (..., out), in the dtype of the base layer's output."""
        y = self.linear(x)
        state = self._shared[0]
        if not state.is_enabled:
            return y
        # A and B are small float32 arrays. Casting x to float32 would cost more than the products.
        low = self._drop(x, state) @ self.lora_a.astype(x.dtype)
        y = mx.addmm(y, low, (self._scaling * self.lora_b).astype(x.dtype))
        if not self._use_dora:
            return y
        return y * (self.m / self._row_norms()).astype(y.dtype)

    def _row_norms(self) -> mx.array:
        """Return the norms of the rows of W + scaling B A, (out,), without a gradient.

        The squares are |w|^2 + 2 s b.(A w) + s^2 b.(A A^T b); the sum W + s B A is never made.

        Source: DoRA, arXiv 2402.09353, equations 5 and 11.
        """
        known = self._norms
        # Without this cache, decoding would compute the norms for every token.
        if known is not None and known[0] is self.lora_a and known[1] is self.lora_b:
            return known[2]
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b).T
        weight = dense_weight(self.linear)
        cross = (b * (weight @ a)).sum(axis=1)
        square = (b * (b @ (a.T @ a))).sum(axis=1)
        norms = mx.sqrt(self._base_squares + 2 * self._scaling * cross + self._scaling**2 * square)
        if not self._shared[0].is_tracing:
            self._norms = self.lora_a, self.lora_b, norms
        return norms

    def _drop(self, x: mx.array, state: LoraState) -> mx.array:
        if self._dropout == 0.0 or state.dropout_rows is None:
            return x
        rows = _lowbias32(state.dropout_rows ^ mx.array(self._module_key, mx.uint32))
        features = mx.array(feature_keys(x.shape[-1]))
        bits = _lowbias32(rows[:, None] ^ features[None, :])
        keep = (bits >> 8) >= mx.array(threshold(self._dropout), mx.uint32)
        return x * (keep.astype(x.dtype) * (1.0 / (1.0 - self._dropout)))


class LoRAEmbedding(nn.Module):
    """E[token] + scaling B A[token]; lora_a is (vocabulary, r) and lora_b is (r, hidden)."""

    def __init__(
        self,
        embedding: nn.Module,
        *,
        shape: tuple[int, int],
        r: int,
        scaling: float,
        state: LoraState,
    ) -> None:
        """Wrap an embedding.

        Args:
            embedding: a plain or quantised embedding; it stays frozen.
            shape: (vocabulary, hidden).
            r: the rank.
            scaling: the factor that multiplies B A.
            state: the shared state of the model's LoRA layers.
        """
        super().__init__()
        self.embedding = embedding
        self.lora_a = mx.zeros((shape[0], r))
        self.lora_b = mx.zeros((r, shape[1]))
        self._scaling = scaling
        self._shared = (state,)
        self.freeze()
        self.unfreeze(keys=["lora_a", "lora_b"], recurse=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Map tokens (T,) to (T, hidden), in the dtype of the base model's embedding."""
        y = self.embedding(tokens)
        if not self._shared[0].is_enabled:
            return y
        return y + (self._scaling * (self.lora_a[tokens] @ self.lora_b)).astype(y.dtype)


def dense_weight(linear: nn.Linear | nn.QuantizedLinear) -> mx.array:
    """Return the weight (out, in) of a plain or quantised linear layer, in float32."""
    is_quantised = isinstance(linear, nn.QuantizedLinear)
    return (dequantized(linear) if is_quantised else linear.weight).astype(mx.float32)


def linear_shape(linear: nn.Linear | nn.QuantizedLinear) -> tuple[int, int]:
    """Return (out, in) of a plain or quantised linear layer."""
    out_features, in_features = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        in_features = in_features * 32 // linear.bits
    return out_features, in_features


def _lowbias32(x: mx.array) -> mx.array:
    """Return a hash of each 32-bit value, bit-equal to phi3_lora.engine.dropout.lowbias32."""
    first, second = (mx.array(m, mx.uint32) for m in MULTIPLIERS)
    x = (x ^ (x >> 16)) * first
    x = (x ^ (x >> 15)) * second
    return x ^ (x >> 16)
