"""Counter-hash dropout in PyTorch, bit-equal to phi3_lora.engine.dropout.

PyTorch has no full uint32 arithmetic. int32 products wrap around in the same way. A logical shift
is an arithmetic shift whose copied sign bits are masked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from phi3_lora.engine.dropout import MULTIPLIERS, UInt32, feature_keys, module_key, threshold


class DropoutKeys:
    """The keys of the tokens in the current forward pass, shared by all layers."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def set(self, rows: UInt32, device: torch.device) -> None:
        """Set the keys for the next forward pass, (T,)."""
        self.rows = _to_tensor(rows).to(device)

    def forget(self) -> None:
        """Turn dropout off until keys are set again."""
        self.rows = None


class HashDropout(nn.Module):
    """Dropout by a hash of token, module and feature; off in eval mode."""

    def __init__(
        self, module: str, num_features: int, probability: float, keys: DropoutKeys
    ) -> None:
        super().__init__()
        self._keys = keys
        self._module = _signed(module_key(module))
        self._threshold = threshold(probability)
        self._scale = 1.0 / (1.0 - probability)
        self._features = _to_tensor(feature_keys(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Set dropped features of x (1, T, in) to zero and scale the others up."""
        if not self.training or self._keys.rows is None:
            return x
        rows = _lowbias32(self._keys.rows ^ self._module)
        bits = _lowbias32(rows[:, None] ^ self._features.to(x.device)[None, :])
        keep = _shift(bits, 8) >= self._threshold
        return x * (keep.to(x.dtype) * self._scale)


def _lowbias32(x: Tensor) -> Tensor:
    x = x ^ _shift(x, 16)
    x = x * _signed(MULTIPLIERS[0])
    x = x ^ _shift(x, 15)
    x = x * _signed(MULTIPLIERS[1])
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _to_tensor(keys: UInt32) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(keys).view(np.int32))
