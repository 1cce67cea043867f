"""Decoding of several sequences with mlx-lm's key-value caches."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from phi3_lora.arrays import Float32
from phi3_lora.engine.decoding import DecodingPass
from phi3_lora.engine.rope import tables_at
from phi3_lora_mlx.model import LoadedPhi3
from phi3_lora_mlx.phi3 import Angles


class KeyValues:
    """Cached keys and values of one sequence: one cache of mlx-lm for each layer."""

    def __init__(self, num_layers: int, device: mx.Device) -> None:
        self.layers = [KVCache() for _ in range(num_layers)]
        self._device = device

    def prefix(self, length: int) -> KeyValues:
        """Return a cache of the first `length` tokens."""
        found = KeyValues(len(self.layers), self._device)
        with mx.stream(self._device):
            for new, old in zip(found.layers, self.layers, strict=True):
                # These slices have no room left, so the next token is written to a copy.
                new.keys, new.values = old.keys[..., :length, :], old.values[..., :length, :]
                new.offset = length
        return found


class CachedDecoder:
    """The model on new ids laid end to end, with the layout of training."""

    def __init__(self, loaded: LoadedPhi3) -> None:
        self._loaded = loaded

    def new_cache(self) -> KeyValues:
        """Return an empty cache."""
        return KeyValues(self._loaded.config.num_hidden_layers, self._loaded.device)

    def forward(self, rows: DecodingPass[KeyValues]) -> Float32:
        """Return the logits after each row's last id, (R, vocabulary)."""
        with mx.stream(self._loaded.device):
            model = self._loaded.model
            tables = tables_at(self._loaded.config, rows.positions, rows.is_long)
            hidden = model(
                mx.array(rows.tokens),
                Angles(*map(mx.array, tables)),
                tuple(rows.starts.tolist()),
                list(zip(*(cache.layers for cache in rows.caches), strict=True)),
            )
            logits = model.head(hidden[mx.array(rows.starts[1:] - 1)])
            return np.array(logits.astype(mx.float32))
