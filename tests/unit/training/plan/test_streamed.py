"""A run whose data is read as it goes: the same steps wherever it is cut, and nothing silent."""

from __future__ import annotations

import itertools
import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import load_splits, resolve_data
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.stream import mixed_rows
from phi3_lora.data.rows.conversation import RawRow
from phi3_lora.data.sources import source as sources_module
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import CheckpointError, DataError
from phi3_lora.training.plan.fixed import Plan
from phi3_lora.training.plan.protocol import Step
from phi3_lora.training.plan.streamed import StreamedPlan
from tests.tiny import chat, write_rows
from tests.unit.streams import ROWS, as_stored, sources_of, stream


@pytest.mark.parametrize("packing", [False, True])
def test_data_that_fits_into_the_buffer_gives_the_steps_of_a_run_that_is_not_streamed(
    tokenizer: ChatTokenizer, path: Path, packing: bool
) -> None:
    train, _ = load_splits(
        resolve_data(str(path)), tokenizer, Encoding(max_length=60), valid_fraction=0, seed=3
    )
    whole = Plan(
        train.documents,
        rows_per_step=4,
        num_epochs=1,
        max_steps=30,
        seed=3,
        row_tokens=60 if packing else None,
    )
    row_tokens = 60 if packing else None
    plan = stream(tokenizer, path, buffer_size=len(ROWS), row_tokens=row_tokens)
    found, expected = list(plan.steps()), list(whole.steps())
    assert [s.indices for s in found] == [s.indices for s in expected]
    assert [s.ends_epoch for s in found] == [s.ends_epoch for s in expected]
    assert sources_of(found) == sources_of(expected)
    assert found[whole.steps_per_epoch - 1].epoch == 1.0


@pytest.mark.parametrize("row_tokens", [None, 60])
def test_each_pass_takes_every_document_once_in_an_order_of_its_own(
    tokenizer: ChatTokenizer, path: Path, row_tokens: int | None
) -> None:
    plan = stream(tokenizer, path, max_steps=100, row_tokens=row_tokens)
    steps = list(plan.steps())
    ends = [i + 1 for i, step in enumerate(steps) if step.ends_epoch]
    first, second = steps[: ends[0]], steps[ends[0] : ends[1]]
    kept = sorted(str(i + 1) for i in range(len(ROWS)) if i % 11 != 5)
    passes = [[line for step in part for line in step] for part in map(sources_of, (first, second))]
    assert sorted(passes[0]) == sorted(passes[1]) == kept
    assert passes[0] != passes[1] and passes[0] != sorted(passes[0], key=int)
    assert sorted(i for step in first for i in step.indices) == list(range(48))
    # Every block is shuffled anew: rows 11 to 20 are the second one.
    orders = [[line for line in part if 10 < int(line) <= 20] for part in passes]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0], key=int)
    # Rows are shuffled within their block alone.
    if row_tokens is None:
        assert sorted(passes[0][:9], key=int) == [str(i) for i in (1, 2, 3, 4, 5, 7, 8, 9, 10)]
        assert [len(step.indices) for step in first] == [4] * 12


def test_the_last_step_of_a_pass_is_short_and_ends_it(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "short.jsonl", [chat(f"q{i}", "a") for i in range(10)])
    steps = list(stream(tokenizer, path, buffer_size=3, max_steps=6).steps())
    assert [len(step.indices) for step in steps] == [4, 4, 2] * 2
    assert [step.ends_epoch for step in steps] == [False, False, True] * 2
    assert [step.epoch for step in steps] == [0.0, 0.0, 1.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("row_tokens", [None, 60])
def test_a_stream_goes_on_from_every_step_as_if_it_had_not_stopped(
    tokenizer: ChatTokenizer, path: Path, row_tokens: int | None
) -> None:
    whole = list(stream(tokenizer, path, row_tokens=row_tokens).steps())
    assert whole[-1].epoch >= 2
    for cut in (1, 2, 3, 7, *range(10, 30)):
        plan = stream(tokenizer, path, row_tokens=row_tokens)
        position = as_stored(whole[cut - 1].position)
        rest = list(plan.steps(after=cut, position=position))
        assert rest == whole[cut:]
        assert sources_of(rest) == sources_of(whole[cut:])
        assert plan.notes(rest[-1].position) == stream(tokenizer, path).notes(whole[-1].position)


def test_rows_before_the_place_are_read_but_not_tokenised_again(
    tokenizer: ChatTokenizer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(stream(tokenizer, path).steps())
    said: list[str] = []
    plan = stream(tokenizer, path, said=said)
    encoded: list[int] = []
    encode = tokenizer.encode_rows
    monkeypatch.setattr(
        tokenizer,
        "encode_rows",
        lambda rows, **more: encoded.append(len(rows)) or encode(rows, **more),
    )
    next(plan.steps(after=10, position=whole[9].position))
    assert encoded == [10]
    assert said[-1] == "reading past 40 rows, up to where the run was"


@pytest.mark.parametrize("line", [0, 2, 24, 30])
def test_other_rows_before_the_place_are_refused(
    tokenizer: ChatTokenizer, tmp_path: Path, path: Path, line: int
) -> None:
    step = list(stream(tokenizer, path).steps())[7]
    changed = [*ROWS]
    changed[line] = chat("another", "row")
    other = stream(tokenizer, write_rows(tmp_path / "other.jsonl", changed))
    with pytest.raises(CheckpointError, match="are not those that the run began with"):
        list(other.steps(after=8, position=step.position))
    # What lies in the first rows is seen before the model is loaded.
    assert (other.hash() == stream(tokenizer, path).hash()) == (line >= 10)


@pytest.mark.parametrize("count", [5, 30, 39])
def test_rows_that_have_become_fewer_are_refused(
    tokenizer: ChatTokenizer, tmp_path: Path, path: Path, count: int
) -> None:
    step = list(stream(tokenizer, path).steps())[9]
    other = stream(tokenizer, write_rows(tmp_path / "other.jsonl", ROWS[:count]))
    with pytest.raises(CheckpointError, match="are not those that the run began with"):
        list(other.steps(after=10, position=step.position))


def test_hash_runs_along_and_tells_data_settings_and_steps_apart(
    tokenizer: ChatTokenizer, tmp_path: Path, path: Path
) -> None:
    def hashes(plan: StreamedPlan) -> list[str]:
        return [plan.hash(), *(plan.hash(step.position) for step in plan.steps())]

    found = hashes(stream(tokenizer, path))
    assert len(set(found)) == 31
    moved = write_rows(tmp_path / "elsewhere" / "moved.jsonl", ROWS)
    assert hashes(stream(tokenizer, moved)) == found
    for changes in ({"seed": 4}, {"rows_per_step": 5}, {"buffer_size": 11}, {"row_tokens": 60}):
        assert stream(tokenizer, path, **changes).hash() != found[0]
    changed = [*ROWS]
    changed[45] = chat("another", "row")
    other = hashes(stream(tokenizer, write_rows(tmp_path / "other.jsonl", changed)))
    same = list(
        itertools.takewhile(lambda pair: pair[0] == pair[1], zip(found, other, strict=True))
    )
    assert 9 < len(same) < 13
    # The hash is of all steps up to its own.
    assert not {*found[len(same) :]} & {*other[len(same) :]}


def test_a_bad_row_stops_the_stream_when_its_block_is_read(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [*ROWS[:14], {"prompt": "?"}, *ROWS[14:], "x"])
    taken: list[Step] = []
    with pytest.raises(DataError) as problem:
        taken += iter(stream(tokenizer, path).steps())
    text = str(problem.value)
    assert text.startswith(f"1 bad row(s) among rows 11 to 20 of {path}; correct or remove them")
    assert f"{path}:15: " in text
    with pytest.raises(DataError, match="among rows 1 to 5"):
        stream(tokenizer, write_rows(tmp_path / "first.jsonl", ["x", *ROWS[:4]]))


def test_what_is_left_out_is_told_of_the_first_rows_and_of_all(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    rows = [*ROWS[:14], {"prompt": "?"}, *ROWS[14:30], *["x"] * 25, *ROWS[30:]]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    said: list[str] = []
    plan = stream(tokenizer, path, said=said, on_bad_row="skip")
    name = "training data, of 10 rows read"
    assert said == [
        f"{name}: dropped 1 of 10 rows longer than max_length 60 tokens "
        f"(longest 105; first {path}:6)"
    ]
    # The third pass has begun; the first one is told of.
    steps = list(plan.steps())
    assert steps[-1].epoch == 2
    bad, dropped = plan.notes(steps[-1].position)
    name = "training data, of 79 rows read"
    assert bad.startswith(f"{name}: skipped 26 bad row(s):\n  {path}:15: needs")
    assert bad.endswith("... and 6 more") and bad.count("\n") == 21
    assert dropped.startswith(f"{name}: dropped 5 of 53 rows longer than max_length 60 tokens")


def test_too_long_rows_are_an_error_where_that_is_asked_for(
    tokenizer: ChatTokenizer, path: Path
) -> None:
    with pytest.raises(DataError, match=r"training data, rows 1 to 10 of .*: longer than"):
        stream(tokenizer, path, too_long="error")


def test_a_pass_with_nothing_to_learn_from_is_an_error_and_does_not_run_for_ever(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "long.jsonl", [chat("q", "a" * 99)] * 25)
    plan = stream(tokenizer, path)
    with pytest.raises(DataError, match=r"no row is left to learn from.*\n.*dropped 25 of 25 rows"):
        list(plan.steps())
    with pytest.raises(DataError, match="has no rows"):
        stream(tokenizer, write_rows(tmp_path / "empty.jsonl", []))


def test_blocks_without_documents_are_passed_over(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    long = [chat("q", "a" * 99)] * 10
    rows = [*long, *ROWS[:5], *long, *long, *ROWS[6:9], *long, *long]
    path = write_rows(tmp_path / "gaps.jsonl", rows)
    steps = list(stream(tokenizer, path, max_steps=4, buffer_size=5).steps())
    assert [len(step.indices) for step in steps] == [4, 4] * 2
    assert [step.ends_epoch for step in steps] == [False, True] * 2


def test_sources_come_in_turn_as_often_as_their_weights_say(tmp_path: Path) -> None:
    counts = {"a": 12, "b": 6, "c": 3}
    weights = {"a": 2.0, "b": 1.0, "c": 0.5}
    sources = [
        Source(
            path=str(write_rows(tmp_path / f"{n}.jsonl", [chat(n, n)] * counts[n])),
            weight=weights[n],
        )
        for n in counts
    ]
    found = "".join(Path(row.source.rpartition(":")[0]).stem for row in mixed_rows(sources))
    assert found == "aabaabcaabaabcaabaabc"
    # One that has ended drops out.
    uneven = [sources[2], sources[0]]
    found = "".join(Path(row.source.rpartition(":")[0]).stem for row in mixed_rows(uneven))
    assert found[:10] == "aaacaaaaca" and len(found) == 15


def test_a_pipe_is_read_once(tokenizer: ChatTokenizer, path: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    plan = stream(tokenizer, pipe, max_steps=12)
    assert sources_of(list(plan.steps())) == sources_of(
        list(stream(tokenizer, path, max_steps=12).steps())
    )
    writer.join()


def test_no_more_is_in_memory_than_a_few_blocks(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = json.dumps(chat("q" * 20, "a" * 20)) + "\n"
    path.write_text(line * 60_000)
    plan = stream(tokenizer, path, buffer_size=500, max_steps=60_000 // 4)
    tracemalloc.start()
    for step in itertools.islice(plan.steps(), 1500):
        assert len(step.documents) == 4
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 60,000 rows would take 30 MB and more.
    assert peak < 8e6


def test_steps_can_be_asked_for_again(tokenizer: ChatTokenizer, path: Path) -> None:
    plan = stream(tokenizer, path)
    assert sources_of(list(plan.steps())) == sources_of(list(plan.steps()))


def test_a_data_set_of_the_hub_is_read_as_it_arrives(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def hub_rows(name: str, subset: str | None, split: str, *, streaming: bool) -> Any:
        assert (name, subset, split, streaming) == ("owner/name", "main", "train", True)
        for number, row in enumerate(ROWS, start=1):
            read.append(number)
            yield RawRow(number, row)

    monkeypatch.setattr(sources_module, "hub_rows", hub_rows)
    plan = stream(tokenizer, Source(path="owner/name/main", streaming=True))
    steps = plan.steps()
    assert [next(steps).number for _ in range(2)] == [1, 2]
    assert read == list(range(1, 11))
    assert next(steps).documents[0].source.startswith("owner/name/main[train]:")
    assert read == list(range(1, 21))


def test_rows_that_change_between_passes_are_told(tokenizer: ChatTokenizer, path: Path) -> None:
    said: list[str] = []
    plan = stream(tokenizer, path, said=said, max_steps=40)
    steps = plan.steps()
    while not next(steps).ends_epoch:
        pass
    write_rows(path, [*ROWS[:45], chat("another", "row"), *ROWS[46:]])
    while not next(steps).ends_epoch:
        pass
    assert said[-1] == (
        f"{path} changed since the first pass: pass 2 read other rows, so that the run cannot be "
        "repeated"
    )
    said.clear()
    list(stream(tokenizer, path, said=said, max_steps=40).steps())
    assert not any("changed" in text for text in said)
