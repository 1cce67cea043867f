"""Faults during streaming: each is reported, and no complete step is lost."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import load_split
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.overlap import DocumentIndex
from phi3_lora.data.documents.stream import Block, StreamedRows
from phi3_lora.data.sources.source import Source
from phi3_lora.engine.packing import packed_rows
from phi3_lora.errors import CheckpointError, DataError
from phi3_lora.training.plan.position import StreamPosition
from phi3_lora.training.plan.streamed import StreamedPlan
from tests.tiny import chat, write_rows
from tests.unit.streams import ROWS, sources_of, stream

LONG = chat("q", "a" * 99)


def test_nothing_follows_the_last_step(tokenizer: ChatTokenizer, path: Path) -> None:
    last = list(stream(tokenizer, path).steps())[-1]
    assert list(stream(tokenizer, path).steps(after=30, position=last.position)) == []


def test_first_rows_without_documents_can_be_packed_and_measured(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "gap.jsonl", [*[LONG] * 10, *ROWS])
    plan = stream(tokenizer, path, row_tokens=60)
    assert plan.facts().steps.row_fill is None
    assert plan.first_steps.padding(lambda lengths: 64) == 0
    assert len(list(plan.steps())) == 30
    nothing = np.zeros(0, dtype=np.int64)
    assert packed_rows(nothing, nothing, 60).num_rows == 0


def test_rows_left_out_after_the_last_document_of_a_pass_are_counted(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "tail.jsonl", [*[chat("q", "a")] * 8, *[LONG] * 25])
    plan = stream(tokenizer, path, max_steps=2)
    (note,) = plan.notes(list(plan.steps())[-1].position)
    assert note.startswith("training data, of 33 rows read: dropped 25 of 33 rows")


@pytest.mark.parametrize("number", [2, 3])
def test_the_steps_before_a_bad_row_are_taken_first(
    tokenizer: ChatTokenizer, tmp_path: Path, number: int
) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [*[chat("q", "a")] * 8, "x"])
    plan = stream(tokenizer, path, buffer_size=8, max_steps=number)
    steps = plan.steps()
    assert [next(steps).number for _ in range(2)] == [1, 2]
    # Two steps need only the eight rows before the bad row.
    if number == 2:
        assert list(steps) == []
        return
    with pytest.raises(DataError, match="bad row"):
        next(steps)


def good() -> dict[str, Any]:
    names = {"epoch": 0, "block": 0, "row": 4, "num_documents": 0}
    counts = {"num_rows": 10, "counts": {"dropped": 1}, "first": {"dropped": ["a:6"]}}
    return {**names, "rows_hash": "a", "plan_hash": "b", "tally": counts}


@pytest.mark.parametrize(
    "changes",
    [
        {"other": 1},
        {"block": -1},
        {"row": "4"},
        {"epoch": True},
        {"num_documents": 1.5},
        {"plan_hash": None},
        {"rows_hash": 3},
        {"tally": []},
        {"tally": {"num_rows": "ten"}},
        {"tally": {"counts": {"dropped": 1}}},
        {"tally": {"counts": {"dropped": 1}, "first": {"dropped": []}}},
        {"tally": {"counts": 3}},
    ],
)
def test_a_damaged_position_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="position in the data is damaged"):
        StreamPosition.from_dict({**good(), **changes})


@pytest.mark.parametrize("changes", [{}, {"row": 10**9}, {"block": 10**30}, {"epoch": 10**30}])
def test_a_position_of_other_rows_is_refused(
    tokenizer: ChatTokenizer, path: Path, changes: dict[str, Any]
) -> None:
    position = StreamPosition.from_dict({**good(), **changes})
    with pytest.raises(CheckpointError, match="not those that the run began with"):
        list(stream(tokenizer, path).steps(after=1, position=position))


def test_a_row_beyond_its_block_is_refused(tokenizer: ChatTokenizer, path: Path) -> None:
    step = next(stream(tokenizer, path).steps())
    assert step.position is not None
    position = dataclasses.replace(step.position, row=10**9)
    with pytest.raises(CheckpointError, match="not those that the run began with"):
        list(stream(tokenizer, path).steps(after=1, position=position))


@pytest.mark.parametrize("change", ["weights", "bad"])
def test_every_part_of_a_row_that_is_read_past_counts(
    tokenizer: ChatTokenizer, tmp_path: Path, change: str
) -> None:
    message = {"role": "user", "content": "q"}
    rows: list[Any] = [chat("q", "a")] * 16
    before = write_rows(tmp_path / "before.jsonl", rows)
    step = list(stream(tokenizer, before, buffer_size=4, max_steps=3).steps())[-1]
    heavy = {"messages": [message, {"role": "assistant", "content": "a", "weight": 1}]}
    rows[5] = {"weights": heavy, "bad": {"prompt": "?"}}[change]
    after = write_rows(tmp_path / "after.jsonl", rows)
    plan = stream(tokenizer, after, buffer_size=4, max_steps=4, on_bad_row="skip")
    with pytest.raises(CheckpointError, match="not those that the run began with"):
        list(plan.steps(after=3, position=step.position))


def test_a_step_without_its_position_is_refused(tokenizer: ChatTokenizer, path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is none after step 3"):
        list(stream(tokenizer, path).steps(after=3))


@pytest.mark.parametrize("cut", [0, 20])
def test_reading_stops_when_it_is_asked_to(tokenizer: ChatTokenizer, path: Path, cut: int) -> None:
    whole = list(stream(tokenizer, path, max_steps=40).steps())
    asked = 0

    def is_stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 25

    position = whole[cut - 1].position if cut else None
    plan = stream(tokenizer, path, max_steps=40)
    found = list(plan.steps(cut, position, is_stopped=is_stopped))
    assert asked == 26
    assert 0 < len(found) < 40 - cut if not cut else found == []
    # The steps before the stop are complete, and the other steps follow.
    position = found[-1].position if found else position
    plan = stream(tokenizer, path, max_steps=40)
    assert found + list(plan.steps(cut + len(found), position)) == whole[cut:]


def test_a_pipe_that_is_used_up_is_reported(tokenizer: ChatTokenizer) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        file.write("".join('{"prompt": "q", "completion": "a"}\n' for _ in range(8)))
    plan = stream(tokenizer, Path(f"/dev/fd/{reading}"), max_steps=5)
    steps = plan.steps()
    assert [next(steps).ends_epoch for _ in range(2)] == [False, True]
    with pytest.raises(DataError, match=r"when read again, after 1 whole pass.*but once"):
        next(steps)
    os.close(reading)


def test_no_more_than_two_blocks_are_held(tokenizer: ChatTokenizer, path: Path) -> None:
    gc.collect()
    for step in stream(tokenizer, path).steps():
        assert step.documents
        assert sum(isinstance(o, Block) for o in gc.get_objects()) == 1


def test_a_buffer_may_be_larger_than_any_data(tokenizer: ChatTokenizer, path: Path) -> None:
    found = list(stream(tokenizer, path, buffer_size=10**20).steps())
    assert found[11].ends_epoch and len(found) == 30


def test_plain_text_is_noted_at_once_and_once(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"text": "abc"}] * 20)
    said: list[str] = []
    plan = stream(tokenizer, path, said=said)
    note = f"{path}: rows of plain text: every token is in the loss"
    assert said == [note]
    list(plan.steps())
    assert said == [note]


@pytest.mark.parametrize("count", [20, 23])
def test_keys_that_are_not_read_are_noted_at_the_end_of_their_file(
    tokenizer: ChatTokenizer, tmp_path: Path, count: int
) -> None:
    rows = [{"text": "abc", "stars": 3}] * count
    said: list[str] = []
    list(stream(tokenizer, write_rows(tmp_path / "text.jsonl", rows), said=said).steps())
    assert [("not read: " in text and "stars" in text) for text in said] == [False, True]


def test_a_later_source_that_cannot_be_read_to_its_end_is_named(
    tokenizer: ChatTokenizer, path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(path.read_bytes())[:-20])
    sources = [Source(path=str(path), weight=25.0), Source(path=str(other))]
    steps = stream(tokenizer, *sources).steps()
    assert next(steps).number == 1
    with pytest.raises(DataError, match=r"other.jsonl.gz"):
        list(steps)


@pytest.mark.parametrize("content", ["", "fewer", "damaged"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end_as_it_was(
    tokenizer: ChatTokenizer, path: Path, tmp_path: Path, content: str
) -> None:
    expected = [step for step in stream(tokenizer, path).steps() if step.epoch == 0]
    plan = stream(tokenizer, path)
    steps = plan.steps()
    found = [next(steps)]
    texts = {"": "", "fewer": '{"prompt": "q", "completion": "a"}\n', "damaged": "{"}
    other = tmp_path / "new"
    other.write_text(texts[content])
    other.replace(path)
    found += [next(steps) for _ in expected[1:]]
    assert found == expected and sources_of(found) == sources_of(expected)
    assert next(steps).ends_epoch
    if content == "fewer":
        assert [len(step.documents) for step in steps] == [1] * (30 - len(expected) - 1)
        return
    with pytest.raises(DataError, match=r"again|bad row"):
        next(steps)


def test_two_streams_of_one_plan_at_once_do_not_disturb_each_other(
    tokenizer: ChatTokenizer, path: Path
) -> None:
    plan = stream(tokenizer, path)
    first, second = plan.steps(), plan.steps()
    pairs = list(zip(first, second, strict=True))
    assert all(a == b for a, b in pairs) and len(pairs) == 30


def test_the_first_row_that_is_validated_on_is_named(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    encoding = Encoding(max_length=60)
    named = [Source(path=str(path))]
    documents = load_split(named, tokenizer, encoding).documents
    said: list[str] = []
    rows = StreamedRows(named, tokenizer, encoding, 5, DocumentIndex(documents[1:]))
    StreamedPlan(rows, rows_per_step=1, max_steps=1, seed=1, note=said.append)
    assert len(said) == 1 and "4 of 5 rows are in the validation data" in said[0]
    assert f"(first {path}:2)" in said[0]


def test_the_longest_row_and_rows_without_loss_are_noted(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    silent = chat("q", "a")
    silent["messages"] = [{**message, "weight": 0} for message in silent["messages"]]
    rows = [chat("q", "a" * 80), LONG, chat("q", "a" * 90), silent, chat("q", "a")]
    said: list[str] = []
    plan = stream(tokenizer, write_rows(tmp_path / "rows.jsonl", rows), said=said, max_steps=2)
    assert "dropped 3 of 5 rows" in said[0] and "(longest 105; first" in said[0]
    assert "dropped 1 of 5 rows without a supervised token" in said[1]
    assert [len(step.documents) for step in plan.steps()] == [1, 1]
