"""Decoding of several sequences with cached keys and values, on transformers' Phi-3."""

from __future__ import annotations

import numpy as np
import torch

from phi3_lora.arrays import Float32
from phi3_lora.engine.decoding import DecodingPass
from phi3_lora.engine.rope import tables_at
from phi3_lora_cuda.documents import Documents, KeyValues
from phi3_lora_cuda.model import LoadedPhi3


class CachedDecoder:
    """Transformers' Phi-3 on new ids laid end to end, with the layout of training."""

    def __init__(self, model: LoadedPhi3, device: torch.device) -> None:
        self._model = model
        self._device = device

    def new_cache(self) -> KeyValues:
        """Return an empty cache."""
        return KeyValues()

    @torch.no_grad()
    def forward(self, rows: DecodingPass[KeyValues]) -> Float32:
        """Return the logits after each row's last id, (R, vocabulary)."""
        model, device = self._model, self._device
        # A training step between two passes leaves the model in train mode.
        if model.causal_lm.training:
            model.causal_lm.eval()
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
