"""Micro-batches of a step's documents, and the plan's count of them before training."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_lora.data.documents.batch import make_batch
from phi3_lora.engine.batching import micro_batch_documents, micro_batches, split_batch
from phi3_lora.engine.protocol import Batch
from phi3_lora.training.plan.facts import StepFacts, StepTokens
from phi3_lora.training.plan.packing import FirstSteps, shuffled_rows
from tests.tiny import random_documents


def documents_of(batch: Batch) -> list[tuple[bytes, bytes, bytes]]:
    bounds = batch.doc_starts
    return [
        tuple(part[a:b].tobytes() for part in (batch.tokens, batch.targets, batch.loss_mask))
        for a, b in itertools.pairwise(bounds)
    ]


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12), max_tokens=st.integers(2, 60))
def test_micro_batches_hold_each_document_once_within_the_budget(
    lengths: list[int], max_tokens: int
) -> None:
    batch = make_batch(random_documents(lengths))
    parts = micro_batches(batch, max_tokens)
    found = [document for part in parts for document in documents_of(part)]
    assert sorted(found) == sorted(documents_of(batch))
    for part in parts:
        assert len(part.tokens) <= max_tokens or len(part.doc_starts) == 2
        assert part.doc_starts[-1] == len(part.tokens)


def test_lengths_decide_which_documents_share_a_part_and_their_order_stays() -> None:
    lengths = np.array([60, 90, 40, 10, 200])
    parts = [part.tolist() for part in micro_batch_documents(lengths, 100)]
    assert parts == [[0, 2], [1, 3], [4]]
    batch = make_batch(random_documents(lengths.tolist()))
    assert len(split_batch(batch, 100)) == 4
    expected = [documents_of(batch)[i] for part in parts for i in part]
    assert [d for part in micro_batches(batch, 100) for d in documents_of(part)] == expected


def test_one_part_is_the_batch_as_it_is() -> None:
    batch = make_batch(random_documents([5, 9, 3]))
    assert micro_batches(batch, 17)[0] is batch


def first_steps(row_tokens: int | None, rows_per_step: int = 2) -> FirstSteps:
    lengths = np.array([30, 10, 20, 40, 25], dtype=np.int64)
    rows = shuffled_rows(lengths, seed=1, part=(0,), row_tokens=row_tokens)
    return FirstSteps(rows, lengths, rows_per_step, row_tokens)


def test_figures_of_the_plan() -> None:
    single = first_steps(None)
    steps = [int(step.sum()) for step in single.document_lengths(99)]
    assert len(steps) == 3 and sum(steps) == 125
    assert single.facts() == StepFacts(
        step_tokens=StepTokens(least=min(steps), mean=42, most=max(steps)), row_fill=None
    )
    assert [len(step) for step in single.document_lengths(99)] == [2, 2, 1]
    assert len(list(single.document_lengths(2))) == 2
    packed = first_steps(50)
    # Three rows of 50: 40 + 10, 30 + 20, and 25.
    assert packed.facts().row_fill == pytest.approx(125 / 150)
    assert sorted(int(s.sum()) for s in packed.document_lengths(99)) in ([25, 100], [50, 75])


def test_padding_is_what_is_computed_beyond_the_tokens() -> None:
    assert first_steps(None).padding(lambda lengths: int(lengths.sum())) == 0
    assert first_steps(None).padding(lambda lengths: 64 * len(lengths)) == pytest.approx(
        1 - 125 / 320
    )
    nothing = FirstSteps(
        shuffled_rows(np.zeros(0, np.int64), seed=1, part=(0,), row_tokens=None),
        np.zeros(0, np.int64),
        2,
        None,
    )
    assert nothing.facts() == StepFacts(step_tokens=None, row_fill=None)
    assert nothing.padding(lambda lengths: 1) == 0
