"""Documents laid end to end in transformers' Phi-3: each attends to itself alone.

Two public extension points are used: a registered attention function, and the model's one
rotary module. Source: transformers, AttentionInterface.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from phi3_lora.backend import Float32, Int32

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
_VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters if varlen_attn else ())

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


class Documents:
    """Where the documents of a row lie."""

    def __init__(self, doc_starts: Int32, device: torch.device, dtype: torch.dtype) -> None:
        self.starts: list[int] = doc_starts.tolist()
        """D + 1 bounds."""
        self.longest = int(np.diff(doc_starts).max())
        """Tokens."""
        self.kernel_starts = (
            torch.from_numpy(doc_starts).to(device, torch.int32)
            if has_flash(device, dtype)
            else None
        )
        """The bounds for the kernel that takes all documents at once, where there is one."""


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    documents: Documents | None = None,
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
        documents: None is one new token after a cached sequence.
        kwargs: what other attention functions read.

    Returns:
        (1, T, heads, head_dim), and no weights.
    """
    if documents is None:
        window = key.shape[2] if sliding_window is None else sliding_window
        out = scaled_dot_product_attention(
            query, key[:, :, -window:], value[:, :, -window:], scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    if documents.kernel_starts is not None:
        bounds, longest = documents.kernel_starts, documents.longest
        return _in_one_kernel(query, key, value, bounds, longest, scaling, sliding_window), None
    parts = []
    for start, end in itertools.pairwise(documents.starts):
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


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one kernel attends within documents of any length here."""
    if varlen_attn is None or device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _in_one_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """All documents at once, (1, T, heads, head_dim); no mask is made."""
    heads = query.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, Any] = {}
    # The names of the arguments differ between PyTorch 2.11 and 2.13.
    if "enable_gqa" in _VARLEN_ARGUMENTS:
        options["enable_gqa"] = True
    elif k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    if "window_size" in _VARLEN_ARGUMENTS:
        options["window_size"] = (sliding_window - 1 if sliding_window else -1, 0)
    else:
        options["is_causal"] = True
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, **options)[None]


def window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look, (length, length)."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < (window or length))


AttentionInterface.register(ATTENTION_NAME, document_attention)
