"""A key-value cache of one sequence, with mlx-lm's caches."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from phi3_lora.backend import Float32
from phi3_lora.rope import tables_at
from phi3_lora_mlx.model import LoadedPhi3
from phi3_lora_mlx.phi3 import Angles


class CachedDecoder:
    """Feeds ids one sequence at a time."""

    def __init__(self, loaded: LoadedPhi3) -> None:
        self._loaded = loaded
        self._caches: list[KVCache] = []

    def prefill(self, ids: Sequence[int], *, is_long: bool) -> Float32:
        """Start anew; logits after the last id, (vocabulary,)."""
        self._caches = [KVCache() for _ in range(self._loaded.config.num_hidden_layers)]
        return self._forward(ids, first=0, is_long=is_long)

    def extend(self, token: int, position: int, *, is_long: bool) -> Float32:
        """Append one id; logits after it, (vocabulary,)."""
        return self._forward([token], first=position, is_long=is_long)

    def _forward(self, ids: Sequence[int], *, first: int, is_long: bool) -> Float32:
        where = np.arange(first, first + len(ids), dtype=np.int32)
        tables = tables_at(self._loaded.config, where, is_long)
        hidden = self._loaded.model(
            mx.array(list(ids)), Angles(*map(mx.array, tables)), (0, len(ids)), self._caches
        )
        logits = self._loaded.model.head(hidden[-1:])
        return np.array(logits[0].astype(mx.float32))
