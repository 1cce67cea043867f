"""The steps of a stream are the same for any buffer and any point of resumption."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import load_splits, resolve_data
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.stream import StreamedRows, mixed_rows
from phi3_lora.data.rows.conversation import BadRow
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import DataError
from phi3_lora.training.plan.fixed import Plan
from phi3_lora.training.plan.protocol import Step
from phi3_lora.training.plan.streamed import StreamedPlan
from tests.tiny import chat, write_rows
from tests.unit.streams import as_stored

MAX_LENGTH = 60
ENCODING = Encoding(max_length=MAX_LENGTH, on_bad_row="skip")
ROWS = {
    "short": chat("q", "a"),
    "longer": chat("q", "a" * 9),
    "long": chat("q", "a" * 25),
    "too long": chat("q", "a" * 99),
    "bad": {"prompt": "?"},
}
USABLE = {"short", "longer", "long"}
sources = st.lists(
    st.tuples(
        st.lists(st.sampled_from(list(ROWS)), min_size=1, max_size=17),
        st.sampled_from([0.3, 1.0, 2.0, 7.0]),
    ),
    min_size=1,
    max_size=3,
)
shapes = st.fixed_dictionaries(
    {
        "buffer_size": st.integers(1, 20),
        "rows_per_step": st.integers(1, 6),
        "max_steps": st.integers(1, 16),
        "row_tokens": st.sampled_from([None, MAX_LENGTH]),
        "seed": st.integers(0, 3),
    }
)


def written(folder: str, kinds: list[tuple[list[str], float]]) -> list[Source]:
    return [
        Source(
            path=str(write_rows(Path(folder) / f"{i}.jsonl", [ROWS[k] for k in some])),
            weight=weight,
        )
        for i, (some, weight) in enumerate(kinds)
    ]


def plan_of(
    tokenizer: ChatTokenizer, named: list[Source], *, buffer_size: int, **shape: Any
) -> StreamedPlan:
    return StreamedPlan(StreamedRows(named, tokenizer, ENCODING, buffer_size), **shape)


def lines(steps: list[Step]) -> list[str]:
    return [document.source for step in steps for document in step.documents]


@settings(max_examples=60, deadline=None)
@given(kinds=sources, shape=shapes)
def test_a_stream_resumed_at_any_step_gives_the_same_steps(
    tokenizer: ChatTokenizer, kinds: list[tuple[list[str], float]], shape: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        named = written(folder, kinds)
        plan = plan_of(tokenizer, named, **shape)
        if not any(kind in USABLE for some, _ in kinds for kind in some):
            with pytest.raises(DataError, match="no row is left to learn from"):
                list(plan.steps())
            return
        whole = list(plan.steps())
        assert [step.number for step in whole] == list(range(1, shape["max_steps"] + 1))
        for cut in range(1, len(whole) + 1):
            again = plan_of(tokenizer, named, **shape)
            position = as_stored(whole[cut - 1].position)
            rest = list(again.steps(after=cut, position=position))
            # Steps hold numbers, epochs, documents and positions, and hashes of them.
            assert rest == whole[cut:]
            assert lines(rest) == lines(whole[cut:])
            last = as_stored(whole[-1].position)
            assert again.notes(last) == plan.notes(whole[-1].position)


@settings(max_examples=40, deadline=None)
@given(kinds=sources, shape=shapes)
def test_each_pass_takes_every_usable_row_once_and_counts_the_others(
    tokenizer: ChatTokenizer, kinds: list[tuple[list[str], float]], shape: dict[str, Any]
) -> None:
    usable = [k for some, _ in kinds for k in some if k in USABLE]
    if not usable:
        return
    with tempfile.TemporaryDirectory() as folder:
        named = written(folder, kinds)
        plan = plan_of(tokenizer, named, **{**shape, "max_steps": 3 * len(usable)})
        first_pass: list[list[Step]] = [[]]
        for step in plan.steps():
            first_pass[-1].append(step)
            if step.ends_epoch:
                first_pass.append([])
        assert len(first_pass) > 3
        for steps in first_pass[:-1]:
            found = lines(steps)
            assert len(found) == len(set(found)) == len(usable)
            assert sorted(i for step in steps for i in step.indices) == list(range(len(usable)))
            assert all(step.documents for step in steps)
        position = first_pass[0][-1].position
        assert position is not None
        counts = position.tally.counts
        all_kinds = [k for some, _ in kinds for k in some]
        assert position.tally.num_rows == len(all_kinds)
        assert counts.get("bad", 0) == all_kinds.count("bad")
        assert counts.get("dropped", 0) == all_kinds.count("too long")


@settings(max_examples=30, deadline=None)
@given(kinds=st.lists(st.sampled_from(list(ROWS)), min_size=1, max_size=17), shape=shapes)
def test_a_buffer_that_holds_all_rows_gives_the_steps_of_a_plan_of_all(
    tokenizer: ChatTokenizer, kinds: list[str], shape: dict[str, Any]
) -> None:
    if not USABLE & {*kinds}:
        return
    with tempfile.TemporaryDirectory() as folder:
        named = written(folder, [(kinds, 1.0)])
        found = plan_of(tokenizer, named, **{**shape, "buffer_size": len(kinds)})
        train, _ = load_splits(
            resolve_data(named[0].path),
            tokenizer,
            ENCODING,
            valid_fraction=0,
            seed=3,
        )
        whole = Plan(
            train.documents,
            rows_per_step=shape["rows_per_step"],
            num_epochs=1,
            max_steps=shape["max_steps"],
            seed=shape["seed"],
            row_tokens=None if shape["row_tokens"] is None else MAX_LENGTH,
        )
        for mine, theirs in zip(found.steps(), whole.steps(), strict=True):
            assert (mine.indices, mine.ends_epoch) == (theirs.indices, theirs.ends_epoch)
            assert lines([mine]) == lines([theirs])


@settings(max_examples=40, deadline=None)
@given(kinds=sources)
def test_mixing_gives_every_row_of_every_source_once_in_its_order(
    kinds: list[tuple[list[str], float]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        named = written(folder, kinds)
        rows = list(mixed_rows(named))
        assert len(rows) == sum(len(some) for some, _ in kinds)
        for source, (some, _) in zip(named, kinds, strict=True):
            mine = [row for row in rows if row.source.startswith(f"{source.path}:")]
            assert [row.source.rpartition(":")[2] for row in mine] == [
                str(i + 1) for i in range(len(some))
            ]
            assert [isinstance(row, BadRow) for row in mine] == [kind == "bad" for kind in some]
