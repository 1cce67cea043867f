from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phi3_lora.engine.batching import rank_share
from phi3_lora.training.plan.fixed import Plan
from tests.tiny import random_documents

LENGTHS = [int(n) for n in np.random.default_rng(7).integers(2, 33, 41)]


def make_plan(lengths: list[int] = LENGTHS, *, data_seed: int = 0, **changes: Any) -> Plan:
    settings = {"rows_per_step": 4, "num_epochs": 2, "max_steps": -1, "seed": 0, **changes}
    return Plan(random_documents(lengths, seed=data_seed), **settings)


def test_hash_is_the_same_for_the_same_run() -> None:
    plan = make_plan()
    plan.step(15)
    assert plan.hash() == make_plan().hash()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"data_seed": 1},
        {"rows_per_step": 5},
        {"num_epochs": 3},
        {"max_steps": 3},
        {"row_tokens": 64},
    ],
)
def test_hash_changes_with(changes: dict[str, Any]) -> None:
    assert make_plan(**changes).hash() != make_plan().hash()


def test_hash_changes_with_the_loss_mask() -> None:
    documents = random_documents([6, 6])
    settings: dict[str, Any] = {"rows_per_step": 1, "num_epochs": 1, "max_steps": -1, "seed": 0}
    before = Plan(documents, **settings).hash()
    documents[1].supervised[4] = False
    assert Plan(documents, **settings).hash() != before


def test_hash_ignores_where_the_data_lies() -> None:
    documents = random_documents([6, 6])
    moved = [d._replace(source="elsewhere") for d in documents]
    settings: dict[str, Any] = {"rows_per_step": 1, "num_epochs": 1, "max_steps": -1, "seed": 0}
    assert Plan(documents, **settings).hash() == Plan(moved, **settings).hash()


def test_last_short_step_is_kept() -> None:
    plan = make_plan()
    assert plan.steps_per_epoch == 11 and plan.total_steps == 22
    assert [len(step.indices) for step in plan.steps()] == ([4] * 10 + [1]) * 2


def test_each_epoch_takes_every_document_once_in_its_own_order() -> None:
    steps = list(make_plan().steps())
    epochs = [[d for s in half for d in s.indices] for half in (steps[:11], steps[11:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]
    assert steps[10].epoch == 1.0 and steps[-1].epoch == 2.0


@pytest.mark.parametrize(("max_steps", "total"), [(5, 5), (50, 50), (0, 22), (-1, 22)])
def test_positive_max_steps_wins_over_epochs(max_steps: int, total: int) -> None:
    plan = make_plan(max_steps=max_steps)
    assert plan.total_steps == total == len(list(plan.steps()))


def test_part_of_an_epoch_is_rounded_up() -> None:
    assert make_plan(num_epochs=0.5).total_steps == 6


def test_steps_after_a_step_are_the_rest() -> None:
    assert list(make_plan().steps(after=13)) == list(make_plan().steps())[13:]


@pytest.mark.parametrize("max_length", [32, 64])
def test_packing_takes_every_document_once_in_rows_that_fit(max_length: int) -> None:
    plan = make_plan(rows_per_step=1, num_epochs=3, row_tokens=max_length)
    rows = [step.indices for step in plan.steps()]
    count = plan.steps_per_epoch
    assert len(rows) == 3 * count
    assert all(sum(LENGTHS[i] for i in row) <= max_length for row in rows)
    for epoch in range(3):
        one = rows[epoch * count : (epoch + 1) * count]
        assert sorted(i for row in one for i in row) == list(range(len(LENGTHS)))
    assert count <= -(-sum(LENGTHS) // max_length) + 2


def test_packed_step_holds_the_rows_of_single_row_steps() -> None:
    packed: dict[str, Any] = {"row_tokens": 32, "num_epochs": 1}
    rows = [s.indices for s in make_plan(rows_per_step=1, **packed).steps()]
    first = make_plan(rows_per_step=3, **packed).step(1)
    assert first.indices == tuple(i for row in rows[:3] for i in row)


def test_batch_and_accumulation_make_the_same_plan() -> None:
    from phi3_lora.config.training import TrainingConfig

    hashes = set()
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        config = TrainingConfig(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        hashes.add(make_plan(rows_per_step=config.documents_per_step).hash())
    assert len(hashes) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_cover_a_step_once(world_size: int) -> None:
    documents = (4, 9, 1, 7)
    shares = [rank_share(documents, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == sorted(documents)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "6ebceef2b2b10b3864eae95fbdaa192aa20817d8c83a1d720aae69b2bb6fe74b"),
        (
            {"row_tokens": 32},
            "75a56aed737bc19cde1ba8a0a7d26c77e255ec6fc579aacb016fedb36e25c973",
        ),
    ],
)
def test_plans_of_runs_that_were_started_before_stay(
    changes: dict[str, Any], expected: str
) -> None:
    assert make_plan(**changes).hash() == expected
