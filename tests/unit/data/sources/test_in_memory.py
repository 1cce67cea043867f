"""Rows in memory: every function reads them like equal rows in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents import cache as token_cache
from phi3_lora.data.documents.dataset import load_splits, resolve_data, resolve_scoring_file
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.store import DocumentStore
from phi3_lora.data.quality.checks import check_rows
from phi3_lora.data.quality.cleaned_files import read_for_cleaning
from phi3_lora.data.quality.splitting import read_split_rows
from phi3_lora.data.sources.in_memory import (
    MemorySource,
    as_source,
    is_named,
    recorded_name,
    with_rows,
)
from phi3_lora.data.sources.reading import iterate_rows, read_conversations, read_rows
from phi3_lora.data.sources.source import ROWS_IN_MEMORY, Source
from phi3_lora.errors import ConfigError, DataError
from phi3_lora.inference.scoring_data import load_to_score
from phi3_lora.training.plan.fixed import Plan
from tests.tiny import chat, write_rows
from tests.unit.streams import ROWS, stream

FORMATS: dict[str, dict[str, Any]] = {
    "messages": chat("q", "a"),
    "weights": {
        "messages": [
            *chat("q", "a")["messages"],
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b", "weight": 0},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "more", "output": "a"},
    "classification": {"text": "good", "label": 1},
    "text": {"text": "plain text"},
    "nulls": {"messages": chat("q", "a")["messages"], "system": None, "tools": None},
}


def read_from_file(folder: Path, rows: list[Any]) -> list[Any]:
    return [c.messages for c in read_conversations(write_rows(folder / "d.jsonl", rows))]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read_as_from_a_file(tmp_path: Path, name: str) -> None:
    rows = [FORMATS[name]] * 2
    found = read_rows(rows)
    assert [c.messages for c in found.conversations] == read_from_file(tmp_path, rows)
    assert [c.source for c in found.conversations] == ["rows:1", "rows:2"]
    assert found.notes == [
        note.replace(str(tmp_path / "d.jsonl"), "rows")
        for note in read_rows(tmp_path / "d.jsonl").notes
    ]


def test_tuples_are_read_as_the_lists_that_a_file_would_hold(tmp_path: Path) -> None:
    turns = chat("q", "a")["messages"]
    rows = [{"prompt": tuple(turns[:1]), "completion": tuple(turns[1:])}]
    assert [c.messages for c in read_conversations(tuple(rows))] == read_from_file(tmp_path, rows)


def test_reading_leaves_the_callers_rows_as_they_were() -> None:
    rows = [{**chat("q", "a"), "tools": [{"name": "f"}], "system": "s"}]
    before = json.dumps(rows)
    read_conversations(rows)
    assert json.dumps(rows) == before


@pytest.mark.parametrize("kind", ["whole", "streamed", "iterable"])
def test_a_data_set_is_read_with_the_names_of_its_classes(kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    labels = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    if kind != "whole":
        data = data.to_iterable_dataset()
    answers = [c.messages[-1]["content"] for c in read_conversations(data)]
    assert answers == ["good", "bad"]
    assert [row.source for row in iterate_rows(data)] == ["rows:1", "rows:2"]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("form", ["list", "data set"])
def test_a_run_on_rows_has_the_plan_of_the_same_rows_in_a_file(
    tokenizer: ChatTokenizer, path: Path, form: str, packing: bool
) -> None:
    rows: Any = ROWS
    if form == "data set":
        rows = pytest.importorskip("datasets").Dataset.from_list(ROWS)

    def plan_hash(data: Any) -> str:
        encoding = Encoding(max_length=60)
        train, valid = load_splits(
            resolve_data(data), tokenizer, encoding, valid_fraction=0.1, seed=3
        )
        assert valid is not None and len(valid.documents) > 0
        shape = {"rows_per_step": 4, "num_epochs": 2, "max_steps": 0, "seed": 3}
        return Plan(train.documents, row_tokens=60 if packing else None, **shape).hash()

    assert plan_hash(rows) == plan_hash(str(path))


def test_rows_are_streamed_as_a_file_is(tokenizer: ChatTokenizer, path: Path) -> None:
    held, from_file = stream(tokenizer, as_source(ROWS)), stream(tokenizer, path)
    assert held.hash() == from_file.hash()
    # The steps need several passes over the rows.
    for step, expected in zip(held.steps(), from_file.steps(), strict=True):
        assert step.position is not None and expected.position is not None
        assert step.position.plan_hash == expected.position.plan_hash


def test_tokens_of_rows_in_memory_are_never_cached(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "CACHE_FROM_BYTES", 0)
    for answer in ("a", "b"):
        files = resolve_data([chat("q", answer)])
        encoding = Encoding(max_length=60)
        train, _ = load_splits(files, tokenizer, encoding, valid_fraction=0, seed=0)
        assert not isinstance(train.documents, DocumentStore)
        assert answer in tokenizer.decode(train.documents[0].tokens.tolist())


def test_rows_to_validate_on_have_a_name_and_the_format_of_the_others() -> None:
    columns = {"prompt": "ask", "completion": "say"}
    first = with_rows(Source(path="x", columns=columns), [{"ask": "q", "say": "a"}])
    files = resolve_data(first, [{"ask": "r", "say": "b"}])
    (valid,) = files.valid
    assert str(valid) == "valid rows" and valid.columns == columns
    assert [c.source for c in read_conversations(files.valid)] == ["valid rows:1"]
    assert not resolve_data(first).valid


def test_a_file_to_validate_on_is_not_read_as_the_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "v.jsonl", [chat("other", "a")])
    (valid,) = resolve_data([chat("q", "a")], str(path)).valid
    assert [c.source for c in read_conversations([valid])] == [f"{path}:1"]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_bad_rows_are_named_by_their_number(on_bad_row: Any) -> None:
    rows = [chat("q", "a"), {}, "text", chat("q", "b")]
    listed = (
        r"bad row\(s\).* in rows[;:](.|\n)*rows:2: (.|\n)*rows:3: must be a JSON object, got str"
    )
    if on_bad_row == "error":
        with pytest.raises(DataError, match=f"^2 {listed}"):
            read_rows(rows)
        return
    found = read_rows(rows, on_bad_row="skip")
    assert [c.source for c in found.conversations] == ["rows:1", "rows:4"]
    with pytest.raises(DataError, match=f"^2 {listed}"):
        raise DataError(found.notes[0].removeprefix("skipped "))


@pytest.mark.parametrize(
    "data",
    [
        *([], (), {"train": [chat("q", "a")]}, iter([chat("q", "a")]), 3, b"rows.jsonl"),
        np.zeros(3),
    ],
    ids=["list", "tuple", "mapping", "iterator", "number", "bytes", "array"],
)
def test_what_is_not_rows_is_refused_in_one_sentence(data: Any) -> None:
    for take in (resolve_data, resolve_scoring_file, read_rows):
        with pytest.raises(DataError, match=r"no rows|must be a path.*; got \w+") as caught:
            take(data)
        assert "\n" not in str(caught.value)


def test_a_mapping_of_splits_and_an_iterator_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"dict: name one of its splits, for example data\['train'"):
        as_source({"train": []})
    with pytest.raises(DataError, match="list_iterator: make a list of it"):
        as_source(iter([]))
    with pytest.raises(ConfigError, match="weight must be > 0"):
        MemorySource(rows=[1], weight=0)


def test_rows_are_scored_checked_cleaned_and_split(tokenizer: ChatTokenizer) -> None:
    rows = [{**chat(f"q{i}", f"a{i}"), "key": i} for i in range(3)]
    said: list[str] = []
    encoding = Encoding(max_length=60)
    scored = load_to_score(rows, tokenizer, encoding, with_conversations=True, note=said.append)
    assert [d.source for d in scored.dataset.documents] == ["rows:1", "rows:2", "rows:3"]
    files = resolve_data(rows)
    assert check_rows(list(iterate_rows(files.train)), near=False).files == ["rows"]
    cleaned, others = read_for_cleaning(files.train, on_bad_row="error", notes=said)
    assert len(cleaned) == 3 and others["rows:2"] == {"key": 1}
    split = read_split_rows(files.train, keys=["key"], near=False)
    assert [json.loads(row.line) for row in split] == rows and said == []


def test_a_configuration_records_rows_and_asks_for_them_again() -> None:
    assert recorded_name([1]) == recorded_name(as_source([chat("q", "a")])) == ROWS_IN_MEMORY
    assert recorded_name(Path("a.jsonl")) == recorded_name(Source(path="a.jsonl")) == "a.jsonl"
    assert is_named("demo") and is_named(Source(path="a")) and not is_named([1])
    assert not is_named(as_source([chat("q", "a")]))
    with pytest.raises(DataError, match=r"were in memory: pass them again, as train\(data=rows\)"):
        resolve_data(ROWS_IN_MEMORY)
    with pytest.raises(DataError, match="pass them again"):
        resolve_data("demo", ROWS_IN_MEMORY)


def test_rows_take_the_settings_of_the_source_in_the_configuration() -> None:
    named = Source(path=ROWS_IN_MEMORY, format="text", streaming=True)
    found = with_rows(named, [{"text": "t"}])
    assert (str(found), found.format, found.streaming) == ("rows", "text", True)
    assert [c.source for c in read_conversations(found)] == ["rows:1"]
    for setting in ("split", "subset"):
        with pytest.raises(ConfigError, match="rows in memory have no split and no subset"):
            with_rows(Source(path=ROWS_IN_MEMORY, **{setting: "train"}), [{"text": "t"}])
