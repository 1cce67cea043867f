"""Batches of prompts, the boundary of LongRoPE and the prefix cache, on a toy model.

The toy's logits are a hash of the cached ids and of each id's LongRoPE factors. So a wrong cache, a
wrong position or an id of another row changes the answer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.engine.decoding import MAX_ROWS, DecodingPass, PrefixCache, choose_token, decode
from phi3_lora.engine.request import Sampling
from phi3_lora.errors import DataError
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from tests.tiny import write_model

VOCABULARY = 50


@dataclass
class ToyKeys:
    ids: list[tuple[int, bool]] = field(default_factory=list)

    def prefix(self, length: int) -> ToyKeys:
        return ToyKeys(self.ids[:length])


class ToyDecoder:
    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def new_cache(self) -> ToyKeys:
        return ToyKeys()

    def forward(self, rows: DecodingPass[ToyKeys]) -> np.ndarray:
        logits = []
        bounds = itertools.pairwise(rows.starts.tolist())
        self.passes.append(np.diff(rows.starts).tolist())
        for (start, end), cache in zip(bounds, rows.caches, strict=True):
            expected = np.arange(len(cache.ids), len(cache.ids) + end - start)
            assert rows.positions[start:end].tolist() == expected.tolist()
            fed = zip(
                rows.tokens[start:end].tolist(), rows.is_long[start:end].tolist(), strict=True
            )
            cache.ids.extend(fed)
            logits.append(self.logits(cache.ids))
        return np.stack(logits)

    @staticmethod
    def logits(ids: list[tuple[int, bool]]) -> np.ndarray:
        assert len({is_long for _, is_long in ids}) == 1, "two sets of factors in one cache"
        seed = [token for token, _ in ids] + [int(ids[0][1])]
        return np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32)


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    return read_model_config(
        write_model(
            tmp_path,
            max_position_embeddings=64,
            original_max_position_embeddings=16,
            rope_scaling=scaling,
        )
    )


def alone(config: ModelConfig, prompt: list[int], sampling: Sampling) -> list[int]:
    """Generate an answer without a cache: each token encodes the whole sequence."""
    ids, answer = list(prompt), []
    while len(answer) < sampling.max_new_tokens and len(ids) <= config.max_position_embeddings:
        is_long = bool(config.uses_long_factors(len(ids)))
        logits = ToyDecoder.logits([(i, is_long) for i in ids])
        answer.append(choose_token(logits, sampling, len(answer)))
        ids.append(answer[-1])
        if answer[-1] in sampling.stop_ids:
            break
    return answer


def run(
    config: ModelConfig,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    decoder: ToyDecoder | None = None,
    prefixes: PrefixCache | None = None,
    max_tokens: int = 8192,
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for index, token in decode(
        decoder or ToyDecoder(),
        config,
        prompts,
        sampling,
        prefixes=prefixes or PrefixCache(),
        max_tokens=max_tokens,
    ):
        found[index].append(token)
    return found


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_tokens", [1, 60, 8192])
def test_every_prompt_gets_the_answer_that_it_gets_alone(
    config: ModelConfig, temperature: float, max_tokens: int
) -> None:
    """Make more than MAX_ROWS prompts: below, at and above the boundary of 16, up to 64 tokens."""
    prompts = prompts_of(1, 3, 14, 15, 16, 17, 40, 63, 64, *range(2, 2 + MAX_ROWS))
    sampling = Sampling(
        max_new_tokens=9, temperature=temperature, stop_ids=frozenset({7, 11, 13}), seed=3
    )
    found = run(config, prompts, sampling, max_tokens=max_tokens)
    assert found == [alone(config, prompt, sampling) for prompt in prompts]
    assert len({len(answer) for answer in found}) > 2


def test_rows_are_fed_together_and_leave_when_they_end(config: ModelConfig) -> None:
    decoder = ToyDecoder()
    prompts = prompts_of(2, 5, 12)
    found = run(config, prompts, Sampling(max_new_tokens=8), decoder=decoder)
    assert decoder.passes[0] == [2, 5, 12]
    assert decoder.passes[1] == [1, 1, 1]
    # The third prompt grows to 17 ids after 5 tokens; only this row is encoded again.
    assert decoder.passes[5] == [1, 1, 17]
    assert all(len(answer) == 8 for answer in found)


def test_a_token_budget_keeps_prompts_waiting(config: ModelConfig) -> None:
    decoder = ToyDecoder()
    run(config, prompts_of(10, 10, 10), Sampling(max_new_tokens=2), decoder=decoder, max_tokens=25)
    assert [sum(fed) for fed in decoder.passes] == [20, 2, 10, 1]


def test_a_prompt_that_starts_as_the_last_sequence_did_is_fed_the_rest(
    config: ModelConfig,
) -> None:
    decoder, prefixes, sampling = ToyDecoder(), PrefixCache(), Sampling(max_new_tokens=3)
    (prompt,) = prompts_of(6)
    (answer,) = run(config, [prompt], sampling, decoder=decoder, prefixes=prefixes)
    follow_up = [*prompt, *answer, 1, 2]
    decoder.passes.clear()
    (second,) = run(config, [follow_up], sampling, decoder=decoder, prefixes=prefixes)
    assert second == alone(config, follow_up, sampling)
    # All ids except the answer's last one are cached.
    assert decoder.passes[0] == [3]
    decoder.passes.clear()
    again = run(config, [follow_up], sampling, decoder=decoder, prefixes=prefixes)
    assert again == [second] and decoder.passes[0] == [1]
    decoder.passes.clear()
    run(config, [[49, *follow_up]], sampling, decoder=decoder, prefixes=prefixes)
    assert decoder.passes[0] == [12]


def test_keys_of_the_other_factors_are_not_reused(config: ModelConfig) -> None:
    decoder, prefixes, sampling = ToyDecoder(), PrefixCache(), Sampling(max_new_tokens=1)
    (prompt,) = prompts_of(20)
    run(config, [prompt[:15]], sampling, decoder=decoder, prefixes=prefixes)
    decoder.passes.clear()
    found = run(config, [prompt], sampling, decoder=decoder, prefixes=prefixes)
    assert decoder.passes[0] == [20] and found == [alone(config, prompt, sampling)]


def test_what_all_prompts_start_with_is_encoded_once(config: ModelConfig) -> None:
    decoder, sampling = ToyDecoder(), Sampling(max_new_tokens=2)
    (common,) = prompts_of(40)
    prompts = [[*common, 1], [*common, 2, 3], common]
    found = run(config, prompts, sampling, decoder=decoder)
    assert found == [alone(config, prompt, sampling) for prompt in prompts]
    assert decoder.passes[:2] == [[40], [1, 2, 1]]


def test_a_prompt_that_cannot_be_is_told(config: ModelConfig) -> None:
    for prompt in ([], [1] * 65):
        with pytest.raises(DataError, match=r"the model takes 1 to 64"):
            run(config, [[1], prompt], Sampling())
    assert run(config, [], Sampling()) == []
    assert run(config, [[1]], Sampling(max_new_tokens=0)) == [[]]
