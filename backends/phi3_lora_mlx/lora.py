"""LoRA layers native in MLX, over plain and quantised linear layers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from phi3_lora.dropout import MULTIPLIERS, feature_keys, module_key, threshold


class LoraState:
    """What all LoRA layers of a model share and the engine sets between calls."""

    def __init__(self) -> None:
        self.is_enabled = True
        self.dropout_rows: mx.array | None = None
        """Keys of the tokens at hand, (T,) uint32; None turns dropout off."""


class LoRALinear(nn.Module):
    """y = W x + scaling B A x, with only A and B trainable.

    lora_a is (in, r) and lora_b (r, out), mlx-lm's orientation: transposes of PEFT's.

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
        state: LoraState | None = None,
    ) -> None:
        super().__init__()
        out_features, in_features = linear_shape(linear)
        self.linear = linear
        self.lora_a = mx.zeros((in_features, r))
        self.lora_b = mx.zeros((r, out_features))
        self._module_key = module_key(module)
        self._scaling = scaling
        self._dropout = dropout
        # In a tuple so that mlx.nn does not take it for a child module or a parameter.
        self._shared = (state or LoraState(),)
        self.freeze()
        self.unfreeze(keys=["lora_a", "lora_b"], recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        """X (..., in) to (..., out), in the dtype of the base layer's output."""
        y = self.linear(x)
        state = self._shared[0]
        if not state.is_enabled:
            return y
        # A and B are float32 and small; casting x to them would cost more than the products.
        low = self._drop(x, state) @ self.lora_a.astype(x.dtype)
        return mx.addmm(y, low, (self._scaling * self.lora_b).astype(x.dtype))

    def _drop(self, x: mx.array, state: LoraState) -> mx.array:
        if self._dropout == 0.0 or state.dropout_rows is None:
            return x
        rows = _lowbias32(state.dropout_rows ^ mx.array(self._module_key, mx.uint32))
        features = mx.array(feature_keys(x.shape[-1]))
        bits = _lowbias32(rows[:, None] ^ features[None, :])
        keep = (bits >> 8) >= mx.array(threshold(self._dropout), mx.uint32)
        return x * (keep.astype(x.dtype) * (1.0 / (1.0 - self._dropout)))


def linear_shape(linear: Any) -> tuple[int, int]:
    """(out, in) of a plain or quantised linear layer."""
    out_features, in_features = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        in_features = in_features * 32 // linear.bits
    return out_features, in_features


def _lowbias32(x: mx.array) -> mx.array:
    """Mix 32 bits; bit-equal to phi3_lora.dropout.lowbias32."""
    first, second = (mx.array(m, mx.uint32) for m in MULTIPLIERS)
    x = (x ^ (x >> 16)) * first
    x = (x ^ (x >> 15)) * second
    return x ^ (x >> 16)
