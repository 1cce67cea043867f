from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from phi3_lora.config.load import load_settings
from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents.dataset import load_splits, resolve_data, resolve_scoring_file
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.mixing import copies
from phi3_lora.data.sources import source as module
from phi3_lora.data.sources.datasets_library import hub_rows, hub_splits
from phi3_lora.data.sources.reading import read_conversations, read_rows
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import ConfigError, DataError
from tests.tiny import chat, write_rows, write_tokenizer

ROWS = [chat(f"q{i}", f"a{i}") for i in range(3)]
TABLE = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]


def places(named: Any) -> list[str]:
    return [row.source for row in read_conversations(named)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with files of each split, in a layout of the hub."""
    root = tmp_path / "data"
    write_rows(root / "train-00000-of-00002.jsonl", ROWS[:2])
    write_rows(root / "train-00001-of-00002.jsonl", ROWS[2:])
    write_rows(root / "deep" / "validation.json", ROWS[:1])
    write_rows(root / "chats_test.jsonl", ROWS[:1])
    write_rows(root / "other.jsonl", ROWS)
    (root / "README.md").write_text("no data")
    (root / "dataset_info.json").write_text("{}")
    write_rows(root / ".cache" / "train.jsonl", ROWS)
    return root


def test_folder_has_its_splits_by_name(folder: Path) -> None:
    files = resolve_data(str(folder))
    train = [f"{folder}/train-00000-of-00002.jsonl", f"{folder}/train-00001-of-00002.jsonl"]
    assert places(files.train) == [f"{train[0]}:1", f"{train[0]}:2", f"{train[1]}:1"]
    assert places(files.valid) == [f"{folder}/deep/validation.json:1"]
    assert places(f"{folder}:test") == [f"{folder}/chats_test.jsonl:1"]
    assert places(Source(path=str(folder), split="dev")) == places(files.valid)


def test_folder_without_names_of_splits_is_to_train_on(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", ROWS)
    second = write_rows(tmp_path / "b.jsonl", ROWS)
    files = resolve_data(str(tmp_path))
    assert places(files.train) == [f"{p}:{i}" for p in (first, second) for i in (1, 2, 3)]
    assert files.valid == ()


def test_folder_is_scored_on_what_is_for_that(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    assert places(resolve_scoring_file(str(tmp_path)))[0] == f"{train}:1"
    test = write_rows(tmp_path / "test.jsonl", ROWS)
    assert places(resolve_scoring_file(str(tmp_path)))[0] == f"{test}:1"
    valid = write_rows(tmp_path / "valid.jsonl", ROWS)
    assert places(resolve_scoring_file(str(tmp_path)))[0] == f"{valid}:1"
    assert places(resolve_scoring_file(f"{tmp_path}:train"))[0] == f"{train}:1"
    assert places(resolve_scoring_file(str(train)))[0] == f"{train}:1"


def test_pattern_names_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS[:1])
    found = places(f"{tmp_path}/[ab].jsonl")
    assert found == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl:1"]
    assert len(places(f"{tmp_path}/**/*.jsonl")) == 3


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("/nowhere/d", "no such data file: /nowhere/d (a file, a folder, a pattern"),
        ("data/missing.jsonl", "no such data file: data/missing.jsonl"),
        ("./owner/name", "no such data file"),
        ("missing", "no such data file"),
        ("none/*.jsonl", "no such data file"),
    ],
)
def test_what_is_not_there_is_named(name: str, phrase: str) -> None:
    with pytest.raises(DataError) as problem:
        resolve_data(name)
    assert phrase in str(problem.value)


def test_what_is_validated_on_streams_as_what_is_trained_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    train = Source(path="owner/name", streaming=True, format="text")
    (valid,) = resolve_data(train, str(path)).valid
    assert (valid.streaming, valid.format) == (True, "text")
    assert resolve_data(train, "owner/name:test").valid[0].streaming
    assert len(places(Source(path=str(path), streaming=True))) == len(ROWS)


def test_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "valid.jsonl", ROWS)
    with pytest.raises(DataError, match="has no train rows: it has valid"):
        resolve_data(str(tmp_path))
    with pytest.raises(DataError, match="only folders and data sets"):
        resolve_data(f"{path}:train")
    with pytest.raises(DataError, match="only data sets of the hub"):
        places(Source(path=str(path), subset="main"))


@pytest.mark.parametrize("is_dict", [True, False])
def test_folder_saved_by_datasets_is_read(tmp_path: Path, is_dict: bool) -> None:
    saved = datasets.Dataset.from_list(TABLE)
    root = tmp_path / "saved"
    if is_dict:
        whole = datasets.DatasetDict({"train": saved, "validation": saved.select([2])})
        whole.save_to_disk(str(root))
    else:
        saved.save_to_disk(str(root))
    files = resolve_data(str(root))
    label = f"{root}[train]" if is_dict else str(root)
    assert places(files.train) == [f"{label}:{i}" for i in (1, 2, 3)]
    assert len(files.valid) == is_dict
    with pytest.raises(DataError, match="has no split 'test'"):
        places(f"{root}:test")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_data_set_of_files_is_read_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, streaming: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list(TABLE)
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        path = str(tmp_path / "set" / f"{split}.{kind}")
        table.to_csv(path) if kind == "csv" else table.to_parquet(path)
    root = str(tmp_path / "set")
    assert sorted(hub_splits(root, None)) == ["test", "train"]
    found = list(hub_rows(root, None, "test", streaming=streaming))
    assert [row.value for row in found] == TABLE
    assert [row.line for row in found] == [1, 2, 3]


def test_classes_are_read_by_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    found = read_conversations(str(tmp_path / "d"))
    assert [row.messages[1]["content"] for row in found] == ["yes", "no"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Source(path="owner/name"), ("owner/name", None, "train", False)),
        (Source(path="owner/name:test[:10%]"), ("owner/name", None, "test[:10%]", False)),
        (Source(path="owner/name/main:test"), ("owner/name", "main", "test", False)),
        (
            Source(path="owner/name", split="test", subset="main", streaming=True),
            ("owner/name", "main", "test", True),
        ),
    ],
)
def test_hub_id_names_a_data_set_with_subset_and_split(
    monkeypatch: pytest.MonkeyPatch, source: Source, expected: tuple[Any, ...]
) -> None:
    asked = []

    def rows(name: str, subset: str | None, split: str, *, streaming: bool) -> Any:
        asked.append((name, subset, split, streaming))
        return iter([module.RawRow(1, TABLE[0])])

    monkeypatch.setattr(module, "hub_rows", rows)
    found = places(source)
    assert asked == [expected]
    subset = f"/{expected[1]}" if expected[1] else ""
    assert found == [f"owner/name{subset}[{expected[2]}]:1"]


def test_hub_data_set_is_validated_on_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hub_splits", lambda name, subset: ["train", "validation", "test"])
    files = resolve_data("owner/name/main")
    assert [s.split for s in files.train] == [None]
    assert [(s.path, s.split) for s in files.valid] == [("owner/name/main", "validation")]
    assert resolve_data("owner/name:test").valid == ()
    assert resolve_scoring_file("owner/name:test")[0].path == "owner/name:test"


def test_fault_of_the_hub_is_an_error_that_names_the_data_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as problem:
        read_conversations("owner/name")
    assert str(problem.value) == (
        "the data set owner/name cannot be read: ConnectionError: no route"
    )


def test_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"datasets: pip install 'phi3-lora\[data\]'"):
        read_conversations("owner/name")


def test_sources_follow_one_another_each_in_its_own_format(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    second = write_rows(tmp_path / "b.jsonl", [{"text": "q", "label": "a"}])
    found = read_rows(
        [
            Source(path=str(first), columns={"prompt": "question", "completion": "answer"}),
            Source(path=str(second), format="text"),
        ]
    )
    assert found.counts == [1, 1]
    assert [row.whole for row in found.conversations] == [False, True]
    assert found.notes == [
        f"{second}: rows of plain text: every token is in the loss; not read: label"
    ]


def test_weights_take_whole_copies_and_a_share_chosen_by_the_seed() -> None:
    left_out = np.zeros(30, dtype=bool)
    left_out[[0, 12]] = True
    taken = copies([0.5, 2.25, 1.0], [10, 10, 10], left_out, seed=3)
    assert taken[:10].sum() == 4 and set(taken[:10]) == {0, 1}
    assert taken[10:20].sum() == 20 and set(taken[10:20]) == {0, 2, 3}
    assert not taken[left_out].any() and (taken[20:] == 1).all()
    assert (copies([0.5, 2.25, 1.0], [10, 10, 10], left_out, seed=3) == taken).all()
    assert (copies([0.5, 2.25, 1.0], [10, 10, 10], left_out, seed=4) != taken).any()


def test_weight_that_takes_no_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"a weight of 0\.1 takes none of its 3 rows"):
        copies([0.1], [3], np.zeros(3, dtype=bool), seed=0)


def test_weighted_sources_are_trained_on_and_never_validated_twice(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264)
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [chat(f"{name}{i}", "a") for i in range(20)])
        for name in ("a", "b")
    ]
    sources = (Source(path=str(paths[0]), weight=2), Source(path=str(paths[1]), weight=0.5))
    files = resolve_data("", more=sources)
    train, valid = load_splits(
        files, tokenizer, Encoding(max_length=64), valid_fraction=0.2, seed=1
    )
    assert valid is not None
    train_places = [d.source for d in train.documents]
    valid_places = [d.source for d in valid.documents]
    assert len(valid_places) == len(set(valid_places)) == 8
    assert not set(valid_places) & set(train_places)
    of_first = [p for p in train_places if p.startswith(str(paths[0]))]
    assert len(of_first) == 2 * len(set(of_first))
    assert len(of_first) // 2 + sum(p.startswith(str(paths[0])) for p in valid_places) == 20


def test_skipped_rows_are_noted_for_both_splits(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264)
    train = write_rows(tmp_path / "train.jsonl", [*ROWS, {}])
    valid = write_rows(tmp_path / "valid.jsonl", [*ROWS, [1]])
    files = resolve_data(str(train), str(valid))
    with pytest.raises(DataError, match=r"1 bad row\(s\)"):
        load_splits(files, tokenizer, Encoding(max_length=64), valid_fraction=0, seed=0)
    encoding = Encoding(max_length=64, on_bad_row="skip")
    splits = load_splits(files, tokenizer, encoding, valid_fraction=0, seed=0)
    for path, split in zip((train, valid), splits, strict=True):
        assert split is not None and len(split.documents) == 3
        assert f"skipped 1 bad row(s) of 4 in {path}:\n  {path}:4: " in split.notes[0]


def settings(**data: Any) -> Any:
    base = {"model": "demo", "output_dir": "runs/a", "data": data}
    return load_settings(base=base).config.data


def test_sources_are_settings() -> None:
    found = settings(
        sources=["a.jsonl", {"path": "o/n", "weight": 0.5, "columns": {"text": "body"}}],
    )
    assert found.sources == (
        Source(path="a.jsonl"),
        Source(path="o/n", weight=0.5, columns={"text": "body"}),
    )
    assert found.source is None
    stored = json.loads(json.dumps([{"path": "a.jsonl", "weight": 2}]))
    assert settings(train="demo", sources=stored).sources[0].weight == 2.0


def test_settings_of_data_belong_to_train() -> None:
    found = settings(train="o/n", split="test", subset="main", streaming=True, format="text")
    assert found.source == Source(
        path="o/n", split="test", subset="main", streaming=True, format="text"
    )


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        ({"train": "demo", "format": "xml"}, "data format must be one of auto, messages"),
        ({"train": "demo", "columns": {"question": "q"}}, "question is not ours (messages,"),
        ({"train": "demo", "columns": {"prompt": 3}}, "must be a mapping from names to names"),
        ({"train": "demo", "on_bad_row": "stop"}, "data.on_bad_row must be one of error, skip"),
        ({"sources": [{"path": "a", "weight": 0}]}, "a: weight must be > 0 and finite, got 0.0"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "unknown key data.sources[1].wieght"),
        ({"sources": [{"weight": 1}]}, "data.sources, entry 1: path is missing"),
        ({"sources": [3]}, "data.sources, entry 1: must be a mapping, got 3"),
        ({"sources": "a.jsonl"}, "data.sources must be a list of mappings, got 'a.jsonl'"),
        ({"sources": ["a"], "split": "test"}, "data.split without data.train: set it in the"),
        ({}, "data is missing"),
    ],
)
def test_bad_setting_says_what_is_allowed(data: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError) as problem:
        settings(**data)
    assert phrase in str(problem.value)


def test_sources_survive_the_run_folder(tmp_path: Path) -> None:
    import yaml

    config = load_settings(
        base={
            "model": "demo",
            "output_dir": "o",
            "data": {"sources": [{"path": "a", "columns": {"text": "b"}}]},
        }
    ).config
    stored = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert load_settings(base=stored).config == config
