"""Documents laid end to end in transformers' Phi-3: each attends only to itself and its cache.

Two public extension points are used: a registered attention function, and the rotary module of the
model. Source: transformers, AttentionInterface.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from phi3_lora.arrays import Float32, Int32

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
_VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters if varlen_attn else ())

ATTENTION_NAME = "phi3_lora_documents"
_CACHE_STEP = 256
"""Tokens by which a cache grows; most new ids then fit without a copy."""


class GivenRotary(nn.Module):
    """A rotary module that returns the angles that the core computed."""

    def __init__(self) -> None:
        super().__init__()
        self._tables: tuple[Tensor, Tensor] | None = None

    def set_tables(self, cos: Float32, sin: Float32, device: torch.device) -> None:
        """Set cos and sin for the next forward pass, each (T, rotary_dim / 2)."""
        tables = (torch.from_numpy(table).to(device) for table in (cos, sin))
        cos_full, sin_full = (torch.cat([t, t], dim=-1)[None] for t in tables)
        self._tables = (cos_full, sin_full)

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return cos and sin, each (1, T, rotary_dim), in the dtype of x, as transformers does."""
        assert self._tables is not None
        cos, sin = self._tables
        return cos.to(x.dtype), sin.to(x.dtype)


class KeyValues:
    """Cached keys and values of one sequence, by layer."""

    def __init__(self) -> None:
        # Each (2, key-value heads, capacity, head_dim).
        self._stores: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

    @property
    def is_empty(self) -> bool:
        """True if nothing is cached."""
        return not self._lengths

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values to a layer; return all of the layer's keys and values.

        Args:
            layer: index of the layer.
            key: new keys, (1, key-value heads, T, head_dim).
            value: new values, with the shape of key.
        """
        start = self._lengths.get(layer, 0)
        end = start + key.shape[2]
        store = self._stores.get(layer)
        if store is None or end > store.shape[2]:
            capacity = -(-end // _CACHE_STEP) * _CACHE_STEP
            grown = key.new_empty(2, key.shape[1], capacity, key.shape[3])
            if store is not None:
                grown[:, :, :start] = store[:, :, :start]
            self._stores[layer] = store = grown
        store[0, :, start:end], store[1, :, start:end] = key[0], value[0]
        self._lengths[layer] = end
        return store[:1, :, :end], store[1:, :, :end]

    def prefix(self, length: int) -> KeyValues:
        """Return a cache of the first `length` tokens."""
        found = KeyValues()
        # A view has no room left: the next append copies it and never writes to it.
        found._stores = {i: store[:, :, :length] for i, store in self._stores.items()}
        found._lengths = dict.fromkeys(self._stores, length)
        return found


class Documents:
    """The bounds of D documents laid end to end, and their caches."""

    def __init__(
        self,
        doc_starts: Int32,
        device: torch.device,
        dtype: torch.dtype,
        caches: Sequence[KeyValues] | None = None,
    ) -> None:
        self.caches = caches
        """D caches; each holds the tokens before the document's first one. None: no caches."""
        self.starts: list[int] = doc_starts.tolist()
        """D + 1 bounds."""
        self.longest = int(np.diff(doc_starts).max())
        """Tokens of the longest document."""
        self.kernel_starts = (
            torch.from_numpy(doc_starts).to(device, torch.int32)
            if has_flash(device, dtype) and all(cache.is_empty for cache in caches or ())
            else None
        )
        """The bounds on the device, for one kernel over all documents; None: no such kernel."""


def document_attention(
    module: Any,
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
    """Compute causal attention within each document.

    Args:
        module: the attention layer.
        query: (1, heads, T, head_dim).
        key: (1, key-value heads, T, head_dim).
        value: (1, key-value heads, T, head_dim).
        attention_mask: always None for this function.
        scaling: factor of the attention scores.
        dropout: always 0 for Phi-3.
        sliding_window: most keys that a query sees, itself included; None: all earlier keys.
        documents: the documents; never None.
        kwargs: arguments of other attention functions, ignored here.

    Returns:
        The output, (1, T, heads, head_dim), and None in place of the attention weights.
    """
    assert documents is not None
    spans = list(itertools.pairwise(documents.starts))
    key_values = [(key[:, :, a:b], value[:, :, a:b]) for a, b in spans]
    if documents.caches is not None:
        key_values = [
            cache.append(module.layer_idx, k, v)
            for cache, (k, v) in zip(documents.caches, key_values, strict=True)
        ]
    if documents.kernel_starts is not None:
        bounds, longest = documents.kernel_starts, documents.longest
        return _in_one_kernel(query, key, value, bounds, longest, scaling, sliding_window), None
    parts = [
        _causal(query[:, :, a:b], k, v, scaling, sliding_window)
        for (a, b), (k, v) in zip(spans, key_values, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """Compute attention of a document's last tokens to the whole document."""
    new, total = q.shape[2], k.shape[2]
    mask = None
    if new == 1:
        first = max(0, total - (window or total))
        k, v = k[:, :, first:], v[:, :, first:]
    elif new < total or (window is not None and total > window):
        mask = window_mask(new, total, window, q.device)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and new > 1, scale=scaling, enable_gqa=True
    )


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this device has one kernel for documents of any length."""
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
    """Compute attention of all documents in one kernel without a mask, (1, T, heads, head_dim)."""
    heads = query.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options: dict[str, bool | tuple[int, int]] = {}
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


def window_mask(new: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Return a mask that is True where a new token may look, (new, total)."""
    index = torch.arange(total, device=device)
    distance = index[total - new :, None] - index[None, :]
    return (distance >= 0) & (distance < (window or total))


AttentionInterface.register(ATTENTION_NAME, document_attention)
