"""Linear layers with quantised weights, which are made dense in each pass.

Source: phi3_lora.models.quantization.grid for the shared grids;
bitsandbytes for nf4, QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Decode = Callable[[Tensor], Tensor]


class StoredLinear(nn.Linear):
    """y = W x; `weight` holds the stored form of W, and both passes make W dense."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Make a layer without weights; loading sets them."""
        super().__init__(in_features, out_features, bias=False, device="meta")

    def decode(self, stored: Tensor) -> Tensor:
        """Return the weight (out, in) in the compute dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        return _FrozenProduct.apply(x, self.weight, self.decode)


class GridLinear(StoredLinear):
    """A layer on a shared grid; `weight` holds the words, (out, in * bits / 32) int32."""

    scales: Tensor
    """(out, in / 32) in the compute dtype."""

    def __init__(self, in_features: int, out_features: int, *, bits: int) -> None:
        """Make a layer without weights; load_state_dict sets words and scales."""
        super().__init__(in_features, out_features)
        shape = (out_features, in_features * bits // 32)
        words = torch.empty(shape, dtype=torch.int32, device="meta")
        self.weight = nn.Parameter(words, requires_grad=False)
        scales = torch.empty((out_features, in_features // 32), device="meta")
        self.register_buffer("scales", scales)
        self.bits = bits

    def decode(self, stored: Tensor) -> Tensor:
        """Return the weight (out, in) in the dtype of the scales; exact in every dtype."""
        codes = stored.view(torch.uint8)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1)
        groups = codes.view(*self.scales.shape, -1).to(self.scales.dtype)
        groups = (groups - 2 ** (self.bits - 1)) * self.scales[..., None]
        return groups.view(self.out_features, self.in_features)


class Nf4Linear(StoredLinear):
    """A layer in bitsandbytes' nf4.

    bitsandbytes' own layer is not used: on a CPU, its first inference repacks the weight for a
    kernel that rounds to bfloat16.
    """

    def quantize(self, weight: Tensor) -> None:
        """Quantise and store a dense weight (out, in) in the compute dtype."""
        from bitsandbytes.functional import quantize_4bit

        stored, self._state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def decode(self, stored: Tensor) -> Tensor:
        """Return the weight (out, in) in the dtype that quantize() received."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(stored, self._state)


class _FrozenProduct(torch.autograd.Function):
    """W x for a stored W; autograd's product would keep the dense W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, decode: Decode) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.decode = decode
        return x @ decode(stored).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (stored,) = ctx.saved_tensors
        return grad @ ctx.decode(stored), None, None


def use_stored(model: nn.Module, paths: list[str], *, bits: int | None) -> None:
    """Replace dense linear layers by layers for quantised weights.

    Args:
        model: the model.
        paths: module paths of the layers to replace.
        bits: bits of the shared grid; None for nf4.
    """
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        dense = model.get_submodule(path)
        assert isinstance(dense, nn.Linear)
        sizes = dense.in_features, dense.out_features
        layer = Nf4Linear(*sizes) if bits is None else GridLinear(*sizes, bits=bits)
        setattr(model.get_submodule(parent_path), name, layer)
