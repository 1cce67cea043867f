"""PEFT's LoRA layer with a forward pass in the base model's dtype.

PEFT casts the input to the adapter's float32 and adds the update in three passes over the output.
Here A and B are cast instead, and the update is added inside the matrix product. Only the
gradients of A and B are float32. With a float32 model, both ways compute the same sum.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor

from phi3_lora_cuda.quantized import Decode, StoredLinear


class LoraLinear(peft.tuners.lora.Linear):
    """PEFT's layer with its own y = W x + scaling B A x, for one active adapter."""

    _norms: tuple[tuple[int, int], Tensor] | None = None
    _base_squares: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., in) to (..., out), in the dtype of the base layer."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (name,) = self.active_adapters
        dropped = self.lora_dropout[name](x)
        linear = self.get_base_layer()
        y: Tensor = _LoraProduct.apply(
            x,
            # torch.compile of PyTorch 2.11 loses the gradient of a tensor that is passed twice.
            None if dropped is x else dropped,
            linear.weight,
            linear.decode if isinstance(linear, StoredLinear) else None,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        magnitude = self.magnitude
        if magnitude is None:
            return y
        return y * (magnitude / self._row_norms(name)).to(y.dtype)

    @property
    def magnitude(self) -> torch.nn.Parameter | None:
        """DoRA's magnitude (out,); None without DoRA."""
        return self._parameters.get("lora_magnitude")

    def add_magnitude(self) -> None:
        """Add DoRA's magnitude; write_adapter sets its values."""
        device = self.get_base_layer().weight.device
        ones = torch.ones(self.out_features, device=device)
        self.register_parameter("lora_magnitude", torch.nn.Parameter(ones))

    @torch.no_grad()
    def _row_norms(self, name: str) -> Tensor:
        """Return the norms of the rows of W + scaling B A, (out,), without a gradient.

        The squares are |w|^2 + 2 s b.(A w) + s^2 b.(A A^T b); the sum W + s B A is never made.

        Source: DoRA, arXiv 2402.09353, equations 5 and 11.
        """
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        # Without this cache, decoding would compute the norms for every token.
        version = (a._version, b._version)
        if self._norms is None or self._norms[0] != version:
            linear = self.get_base_layer()
            stored = linear.weight
            weight = linear.decode(stored) if isinstance(linear, StoredLinear) else stored
            weight = weight.float()
            if self._base_squares is None:
                self._base_squares = weight.double().square().sum(1)
            cross = (b * (weight @ a.T)).double().sum(1)
            square = (b * (b @ (a @ a.T))).double().sum(1)
            total = self._base_squares + 2 * scaling * cross + scaling**2 * square
            self._norms = version, total.sqrt().float()
        return self._norms[1]


class TrainedWeight(torch.nn.Module):
    """A module whose whole weight trains in float32; it computes in the base model's dtype."""

    def __init__(self, base: torch.nn.Module) -> None:
        """Wrap a module; its weight is copied and stays frozen."""
        super().__init__()
        self.base = base
        original = base.weight
        assert isinstance(original, Tensor)
        self._dtype = original.dtype
        self.weight = torch.nn.Parameter(original.detach().float().clone())
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Run the module with the trained weight instead of its original weight."""
        if not self.is_enabled:
            return self.base(x)
        weight = self.weight.to(self._dtype)
        return torch.func.functional_call(self.base, {"weight": weight}, (x,))


class _LoraProduct(torch.autograd.Function):
    """W x + scaling B A dropped, where `dropped` is x after dropout; None means x.

    W stays in its stored form, and both passes make it dense with `decode`. None: W is dense.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        stored: Tensor,
        decode: Decode | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        x_rows = x.reshape(-1, x.shape[-1])
        rows = x_rows if dropped is None else dropped.reshape(-1, x.shape[-1])
        weight = stored if decode is None else decode(stored)
        a_cast, b_cast = a.to(weight.dtype), (b * scaling).to(weight.dtype)
        low = rows @ a_cast.T
        y = x_rows @ weight.T
        y.addmm_(low, b_cast.T)
        ctx.save_for_backward(rows, low, stored, a_cast, b_cast)
        ctx.decode, ctx.scaling, ctx.shape, ctx.is_plain = decode, scaling, x.shape, dropped is None
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, stored, a_cast, b_cast = ctx.saved_tensors
        slope = grad.reshape(-1, grad.shape[-1])
        low_slope = slope @ b_cast
        grad_a = _product_in_float32(low_slope.T, rows)
        grad_b = _product_in_float32(slope.T, low) * ctx.scaling
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = slope @ (stored if ctx.decode is None else ctx.decode(stored))
            if ctx.is_plain:
                grad_x.addmm_(low_slope, a_cast)
            else:
                grad_dropped = (low_slope @ a_cast).view(ctx.shape)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices and return float32; on a GPU without rounding to half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()
