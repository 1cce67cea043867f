"""Documents laid end to end in transformers' Phi-3: each attends to itself alone.

Two public extension points are used: a registered attention function, and the model's one
rotary module. Source: transformers, AttentionInterface.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from phi3_lora.backend import Float32

ATTENTION_NAME = "phi3_lora_documents"


class GivenRotary(nn.Module):
    """Gives the layers the angles that the core computed for the tokens at hand."""

    def __init__(self) -> None:
        super().__init__()
        self._tables: tuple[Tensor, Tensor] | None = None

    def set_tables(self, cos: Float32, sin: Float32, device: torch.device) -> None:
        """Take cos and sin of the next forward pass, each (T, rotary_dim / 2)."""
        tables = (torch.from_numpy(table).to(device) for table in (cos, sin))
        cos_full, sin_full = (torch.cat([t, t], dim=-1)[None] for t in tables)
        self._tables = (cos_full, sin_full)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cos and sin, each (1, T, rotary_dim), in the dtype of x as transformers gives them."""
        assert self._tables is not None
        cos, sin = self._tables
        return cos.to(x.dtype), sin.to(x.dtype)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    doc_starts: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        module: the attention layer; unused.
        query: (1, heads, T, head_dim).
        key: (1, key-value heads, T or cached length, head_dim).
        value: as key.
        attention_mask: always None for this function.
        scaling: of the scores.
        dropout: always 0 for Phi-3.
        sliding_window: keys a query sees at most, itself included.
        doc_starts: bounds of the documents; None is one new token after a cached sequence.
        kwargs: what other attention functions read.

    Returns:
        (1, T, heads, head_dim), and no weights.
    """
    if doc_starts is None:
        window = key.shape[2] if sliding_window is None else sliding_window
        out = scaled_dot_product_attention(
            query, key[:, :, -window:], value[:, :, -window:], scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    parts = []
    for start, end in itertools.pairwise(doc_starts):
        length = end - start
        windowed = sliding_window is not None and length > sliding_window
        mask = window_mask(length, sliding_window, query.device) if windowed else None
        parts.append(
            scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look, (length, length)."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < (window or length))


AttentionInterface.register(ATTENTION_NAME, document_attention)
