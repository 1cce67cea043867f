"""Linear layers whose weights are stored in few bits and made dense when used.

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
    """y = W x with W kept as it is stored, in weight, and made dense in both passes."""

    def __init__(self, in_features: int, out_features: int) -> None:
        """Take the sizes; what is stored comes while loading."""
        super().__init__(in_features, out_features, bias=False, device="meta")

    def decode(self, stored: Tensor) -> Tensor:
        """The weight (out, in) in the compute dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) to (..., out)."""
        return _FrozenProduct.apply(x, self.weight, self.decode)


class GridLinear(StoredLinear):
    """W on a shared grid: weight holds the words, (out, in * bits / 32) int32."""

    scales: Tensor
    """(out, in / 32), in the compute dtype."""

    def __init__(self, in_features: int, out_features: int, *, bits: int) -> None:
        """Take the sizes; words and scales come with load_state_dict."""
        super().__init__(in_features, out_features)
        shape = (out_features, in_features * bits // 32)
        words = torch.empty(shape, dtype=torch.int32, device="meta")
        self.weight = nn.Parameter(words, requires_grad=False)
        scales = torch.empty((out_features, in_features // 32), device="meta")
        self.register_buffer("scales", scales)
        self.bits = bits

    def decode(self, stored: Tensor) -> Tensor:
        """The weight (out, in) in the dtype of the scales; exact in all of them."""
        codes = stored.view(torch.uint8)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1)
        groups = codes.view(*self.scales.shape, -1).to(self.scales.dtype)
        groups = (groups - 2 ** (self.bits - 1)) * self.scales[..., None]
        return groups.view(self.out_features, self.in_features)


class Nf4Linear(StoredLinear):
    """W in bitsandbytes' nf4.

    Its own layer is not used: on a CPU it packs the weight anew at the first inference, for a
    kernel that rounds to bfloat16.
    """

    def quantize(self, weight: Tensor) -> None:
        """Take a dense weight (out, in) in the compute dtype."""
        from bitsandbytes.functional import quantize_4bit

        stored, self._state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def decode(self, stored: Tensor) -> Tensor:
        """The weight (out, in) in the dtype that it was given in."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(stored, self._state)


class _FrozenProduct(torch.autograd.Function):
    """W x for a stored W; autograd's own product would keep W dense for the backward pass."""

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
    """Put layers for words (or, without bits, for nf4) in the place of a model's dense ones."""
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        dense = model.get_submodule(path)
        assert isinstance(dense, nn.Linear)
        sizes = dense.in_features, dense.out_features
        layer = Nf4Linear(*sizes) if bits is None else GridLinear(*sizes, bits=bits)
        setattr(model.get_submodule(parent_path), name, layer)
