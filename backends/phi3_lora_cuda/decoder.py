"""Cached decoding of several sequences on transformers' Phi-3."""

from __future__ import annotations

import numpy as np
import torch

from phi3_lora.arrays import Float32
from phi3_lora.engine.decoding import DecodingPass
from phi3_lora.engine.rope import tables_at
from phi3_lora_cuda.documents import Documents, KeyValues
from phi3_lora_cuda.model import LoadedPhi3


class CachedDecoder:
    """Feeds new ids laid end to end, as documents are in training."""

    def __init__(self, model: LoadedPhi3, device: torch.device) -> None:
        self._model = model
        self._device = device

    def new_cache(self) -> KeyValues:
        """An empty cache."""
        return KeyValues()

    @torch.no_grad()
    def forward(self, rows: DecodingPass[KeyValues]) -> Float32:
        """Logits after each row's last id, (R, vocabulary)."""
        model, device = self._model, self._device
        model.rotary.set_tables(*tables_at(model.config, rows.positions, rows.is_long), device)
        with model.uncompiled():
            out = model.causal_lm.model(
                input_ids=torch.from_numpy(rows.tokens).to(device, torch.long)[None],
                position_ids=torch.from_numpy(rows.positions).to(device, torch.long)[None],
                use_cache=False,
                documents=Documents(rows.starts, device, model.dtype, rows.caches),
            )
        last = torch.from_numpy(rows.starts[1:] - 1).to(device)
        logits = model.head(out.last_hidden_state[0][last])
        return np.asarray(logits.float().cpu().numpy())
