"""Token-by-token generation, shared by the backends: choice of tokens and LongRoPE's boundary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from phi3_lora.backend import Float32, Sampling
from phi3_lora.errors import DataError
from phi3_lora.models import ModelConfig
from phi3_lora.seeding import raw_stream


class Decoder(Protocol):
    """A model with a key-value cache of one sequence."""

    def prefill(self, ids: Sequence[int], *, is_long: bool) -> Float32:
        """Start anew with these ids; logits after the last one, (vocabulary,)."""

    def extend(self, token: int, position: int, *, is_long: bool) -> Float32:
        """Append one id; logits after it, (vocabulary,)."""


def decode(
    decoder: Decoder, config: ModelConfig, prompt: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    """New ids after a prompt; the stop token, if met, comes last.

    The cached keys hold the angles of one set of LongRoPE factors. When the sequence grows over
    the boundary, it is encoded again with the other set, as if it had been the prompt.

    Raises:
        DataError: when the prompt is empty or longer than the model's context.
    """
    ids = list(prompt)
    limit = config.max_position_embeddings
    if not 0 < len(ids) <= limit:
        raise DataError(f"the prompt has {len(ids):,} tokens; the model takes 1 to {limit:,}")
    is_long = bool(config.uses_long_factors(len(ids)))
    logits = decoder.prefill(ids, is_long=is_long)
    for index in range(sampling.max_new_tokens):
        token = choose_token(logits, sampling, index)
        yield token
        if token in sampling.stop_ids or len(ids) == limit:
            return
        if index + 1 == sampling.max_new_tokens:
            return
        ids.append(token)
        if bool(config.uses_long_factors(len(ids))) != is_long:
            is_long = not is_long
            logits = decoder.prefill(ids, is_long=is_long)
        else:
            logits = decoder.extend(token, len(ids) - 1, is_long=is_long)


def choose_token(logits: Float32, sampling: Sampling, index: int) -> int:
    """The index-th new token: the largest logit, or a draw that is equal on every backend."""
    if sampling.temperature <= 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.cumsum(np.exp(scaled - scaled.max()))
    draw = int(raw_stream(sampling.seed, "sample", index, size=1)[0]) / 2**64
    return int(min(np.searchsorted(weights, draw * weights[-1], side="right"), len(weights) - 1))
