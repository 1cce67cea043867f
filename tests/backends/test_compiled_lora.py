"""torch.compile on our LoRA product: compiled and eager layers have equal gradients."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from phi3_lora_cuda.lora import LoraLinear


class Block(nn.Module):
    """A layer between two operations: the gradient of its input is needed."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        config = peft.LoraConfig(r=2, lora_dropout=dropout)
        self.proj = LoraLinear(
            nn.Linear(8, 6, bias=False), "default", config=config, r=2, lora_dropout=dropout
        )
        self.proj.get_base_layer().requires_grad_(False)
        nn.init.normal_(self.proj.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.proj(torch.tanh(x)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_gradients_are_those_of_the_eager_layer(dropout: float) -> None:
    torch.manual_seed(0)
    block = Block(dropout)
    x = torch.randn(1, 7, 8, requires_grad=True)
    found = []
    for run in (block, torch.compile(block, backend="aot_eager", dynamic=True)):
        torch.manual_seed(1)
        parameters = [x, *(p for p in block.parameters() if p.requires_grad)]
        found.append(torch.autograd.grad(run(x).square().sum(), parameters))
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*found, strict=True))
