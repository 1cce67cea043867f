from __future__ import annotations

import numpy as np
import pytest

from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.dropout import keep_mask, row_keys
from phi3_lora.engine.random_streams import permutation, uniform
from phi3_lora.training.plan.schedule import learning_rate
from tests.tiny import random_documents

PATH = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Steps 1, 11 (half of the warm-up), 21 (its end), 61 (half of the rest), 100 (the last).
        ("linear", [0.0, 1.0, 2.0, 1.0, 2.0 / 80]),
        ("cosine", [0.0, 1.0, 2.0, 1.0, 1.0 - np.cos(np.pi / 80)]),
        ("constant", [2.0] * 5),
        ("constant_with_warmup", [0.0, 1.0, 2.0, 2.0, 2.0]),
    ],
)
def test_learning_rate_of_each_kind(kind: str, expected: list[float]) -> None:
    found = [
        learning_rate(step, kind=kind, peak_lr=2.0, warmup_steps=20, total_steps=100)
        for step in (1, 11, 21, 61, 100)
    ]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_without_warm_up_the_first_step_has_the_peak(kind: str) -> None:
    assert learning_rate(1, kind=kind, peak_lr=0.5, warmup_steps=0, total_steps=1) == 0.5


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_learning_rate_never_falls_below_zero(kind: str) -> None:
    assert learning_rate(200, kind=kind, peak_lr=1.0, warmup_steps=0, total_steps=100) == 0.0


def test_uniform_golden_values() -> None:
    found = uniform(0, PATH, (2, 3), 0.5)
    assert found.dtype == np.float32
    golden = [0.0019496679306030273, -0.21285825967788696, -0.06322282552719116]
    assert found.ravel()[:3].tolist() == golden


def test_uniform_fills_its_bounds() -> None:
    found = uniform(1, PATH, (100, 100), 0.25)
    assert found.min() >= -0.25 and found.max() < 0.25
    assert abs(float(found.mean())) < 0.005
    assert float(found.var()) == pytest.approx(0.25**2 / 3, rel=0.03)


def test_uniform_streams_are_their_own() -> None:
    first = uniform(0, PATH, (8,), 1.0)
    assert not np.array_equal(first, uniform(1, PATH, (8,), 1.0))
    assert not np.array_equal(first, uniform(0, "model.layers.1.mlp.down_proj", (8,), 1.0))


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_permutation_is_a_permutation(size: int) -> None:
    assert sorted(permutation(5, "epoch", 2, size=size).tolist()) == list(range(size))


def test_permutation_golden_values() -> None:
    assert permutation(0, "epoch", 0, size=8).tolist() == [3, 6, 7, 5, 1, 2, 4, 0]
    assert permutation(3, "epoch", 1, size=8).tolist() == [2, 5, 1, 6, 7, 4, 3, 0]


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_dropout_rate_is_near_p(probability: float) -> None:
    batch = make_batch(random_documents([100, 200], seed=3))
    kept = keep_mask(row_keys(batch, seed=0, step=1), PATH, 300, probability)
    sigma = np.sqrt(probability * (1 - probability) / kept.size)
    assert abs((1 - kept.mean()) - probability) < 5 * sigma


def test_dropout_of_p_zero_keeps_everything() -> None:
    batch = make_batch(random_documents([50], seed=3))
    assert keep_mask(row_keys(batch, seed=0, step=1), PATH, 64, 0.0).all()


def test_dropout_of_a_document_is_the_same_alone_and_in_a_batch() -> None:
    documents = random_documents([5, 9, 7], seed=4)
    together = row_keys(make_batch(documents), seed=2, step=6)
    alone = [row_keys(make_batch([d]), seed=2, step=6) for d in documents]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    backwards = row_keys(make_batch(documents[::-1]), seed=2, step=6)
    np.testing.assert_array_equal(backwards, np.concatenate(alone[::-1]))


def test_dropout_differs_by_seed_step_and_module() -> None:
    batch = make_batch(random_documents([20], seed=5))
    masks = [
        keep_mask(row_keys(batch, seed=seed, step=step), module, 64, 0.5)
        for seed, step, module in [(0, 1, PATH), (1, 1, PATH), (0, 2, PATH), (0, 1, "other")]
    ]
    for mask in masks[1:]:
        assert 0.4 < (mask == masks[0]).mean() < 0.6
