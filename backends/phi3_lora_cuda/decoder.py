"""A key-value cache of one sequence on transformers' Phi-3."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from phi3_lora.backend import Float32
from phi3_lora.rope import tables_at
from phi3_lora_cuda.documents import Documents
from phi3_lora_cuda.model import LoadedPhi3


class CachedDecoder:
    """Feeds ids one sequence at a time."""

    def __init__(self, model: LoadedPhi3, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._cache = DynamicCache()

    def prefill(self, ids: Sequence[int], *, is_long: bool) -> Float32:
        """Start anew; logits after the last id, (vocabulary,)."""
        self._cache = DynamicCache()
        return self._forward(ids, first=0, is_long=is_long)

    def extend(self, token: int, position: int, *, is_long: bool) -> Float32:
        """Append one id; logits after it, (vocabulary,)."""
        return self._forward([token], first=position, is_long=is_long)

    @torch.no_grad()
    def _forward(self, ids: Sequence[int], *, first: int, is_long: bool) -> Float32:
        where = np.arange(first, first + len(ids), dtype=np.int32)
        self._model.rotary.set_tables(*tables_at(self._model.config, where, is_long), self._device)
        tokens = torch.tensor([list(ids)], device=self._device)
        bounds = np.array([0, len(ids)], np.int32)
        documents = Documents(bounds, self._device, self._model.dtype) if first == 0 else None
        with self._model.uncompiled():
            out = self._model.causal_lm.model(
                input_ids=tokens,
                position_ids=torch.from_numpy(where).to(self._device)[None],
                past_key_values=self._cache,
                use_cache=True,
                documents=documents,
            )
        logits = out.last_hidden_state[0, -1] @ self._model.head_weight.T
        return np.asarray(logits.float().cpu().numpy())
