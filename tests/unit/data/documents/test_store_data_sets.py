"""Data sets, saved or of the hub, are read through the cache of tokens, as files are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents import cache as token_cache
from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.data.documents.dataset import load_splits, resolve_data
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.data.documents.store import DocumentStore
from phi3_lora.data.sources.source import Source
from phi3_lora.storage.cache import cache_root

Rows = list[dict[str, Any]]
KINDS = ("saved", "saved alone", "hub")


@pytest.fixture(autouse=True)
def own_caches(empty_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(token_cache, "CACHE_FROM_BYTES", 0)


def pairs(count: int, answer: str = "a") -> Rows:
    return [{"prompt": f"q{i}", "completion": answer * (i % 5 + 1)} for i in range(count)]


def write_data_set(root: Path, kind: str, rows: Rows, test: Rows) -> str:
    """Write training and test rows to a folder, which may stand for a repository of the hub."""
    table, other = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(test)
    if kind == "saved":
        datasets.DatasetDict({"train": table, "test": other}).save_to_disk(str(root))
    elif kind == "saved alone":
        table.save_to_disk(str(root))
    else:
        table.to_parquet(root / "train.parquet")
        other.to_parquet(root / "test.parquet")
    return "owner/name" if kind == "hub" else str(root)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder from which owner/name is read."""
    load = datasets.load_dataset
    root = tmp_path / "repository"
    root.mkdir()

    def load_locally(name: str, subset: str | None, **options: Any) -> Any:
        assert name == "owner/name"
        return load(str(root), subset, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_locally)
    monkeypatch.setattr(
        "phi3_lora.data.sources.source.hub_splits", lambda name, subset: ["train", "test"]
    )
    return root


@pytest.fixture
def root(request: pytest.FixtureRequest, hub: Path, tmp_path: Path) -> Path:
    return hub if request.node.callspec.params["kind"] == "hub" else tmp_path / "saved"


def load(
    source: str | Source,
    tokenizer: ChatTokenizer,
    said: list[str] | None = None,
    seed: int = 3,
    **more: Any,
) -> Dataset:
    encoding = Encoding(**{"max_length": 60, **more})
    said = [] if said is None else said
    return load_splits(
        resolve_data(source), tokenizer, encoding, valid_fraction=0.0, seed=seed, note=said.append
    )[0]


def stores() -> list[Path]:
    folder = cache_root() / "tokens"
    return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.exists() else []


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_data_set_are_made_once_and_found_by_the_next_run(
    root: Path, kind: str, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_data_set(root, kind, pairs(40), pairs(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CACHE_FROM_BYTES", 10**9)
        expected = load(name, tokenizer)
    assert isinstance(expected.documents, list) and stores() == []
    said: list[str] = []
    made = load(name, tokenizer, said)
    assert said == [f"tokenising {name}, once, into {stores()[0]}"]

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("was tokenised again")

    monkeypatch.setattr(ChatTokenizer, "encode_rows", fails)
    found = load(name, tokenizer, said, seed=4)
    assert said[1:] == [f"tokens of {name} found in {stores()[0]}"]
    for dataset in (made, found):
        # The documents are on the disk, not in memory.
        assert isinstance(dataset.documents, DocumentStore)
        assert dataset.notes == expected.notes
        assert documents_digest(dataset.documents) == documents_digest(expected.documents)
    assert [d.source for d in found.documents] == [d.source for d in expected.documents]


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_of_other_rows_in_the_same_place_is_tokenised_again(
    root: Path, kind: str, tokenizer: ChatTokenizer
) -> None:
    name = write_data_set(root, kind, pairs(4), pairs(1))
    first = load(name, tokenizer)
    write_data_set(root, kind, pairs(4, answer="b"), pairs(1))
    second = load(name, tokenizer)
    assert len(stores()) == 2
    assert documents_digest(first.documents) != documents_digest(second.documents)


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_splits_and_parts_of_them_have_tokens_of_their_own(
    root: Path, kind: str, tokenizer: ChatTokenizer
) -> None:
    name = write_data_set(root, kind, pairs(10), pairs(3))
    wanted = {None: 10, "test": 3}
    if kind == "hub":
        wanted |= {"train[:20%]": 2, "train[20%:]": 8}
    for _ in range(2):
        for split, count in wanted.items():
            found = load(Source(path=name, split=split), tokenizer)
            assert len(found.documents) == count
    assert len(stores()) == len(wanted)


def test_other_names_of_classes_make_other_tokens(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    folder = tmp_path / "saved"
    answers = []
    for names in (["no", "yes"], ["bad", "fine"]):
        label = datasets.ClassLabel(names=names)
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        rows = datasets.Dataset.from_list([{"text": "q", "label": 1}], features=features)
        rows.save_to_disk(str(tmp_path / "new"))
        description = (tmp_path / "new" / "dataset_info.json").read_text()
        if not folder.exists():
            (tmp_path / "new").rename(folder)
        # The files of the rows do not change.
        (folder / "dataset_info.json").write_text(description)
        document = load(str(folder), tokenizer).documents[0]
        answers.append(tokenizer.decode(document.tokens[document.supervised].tolist()))
    assert answers == ["yes", "fine"] and len(stores()) == 2


def test_a_data_set_is_cached_from_its_size_on_the_disk_on(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    name = write_data_set(folder, "saved", pairs(9), pairs(2000))
    size = sum(path.stat().st_size for path in (folder / "train").iterdir())
    monkeypatch.setattr(token_cache, "CACHE_FROM_BYTES", size + 1)
    assert isinstance(load(name, tokenizer).documents, list)
    monkeypatch.setattr(token_cache, "CACHE_FROM_BYTES", size)
    assert isinstance(load(name, tokenizer).documents, DocumentStore)


def test_streamed_data_sets_are_not_cached(hub: Path, tokenizer: ChatTokenizer) -> None:
    name = write_data_set(hub, "hub", pairs(4), pairs(1))
    found = load(Source(path=name, streaming=True), tokenizer)
    assert isinstance(found.documents, list) and len(found.documents) == 4 and stores() == []


def test_a_data_set_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    name = write_data_set(folder, "saved alone", pairs(4), pairs(1))
    encode = token_cache.encode_in_parts

    def changing(*arguments: Any) -> Any:
        yield from encode(*arguments)
        os.utime(folder / "data-00000-of-00001.arrow", ns=(1, 1))

    monkeypatch.setattr(token_cache, "encode_in_parts", changing)
    with pytest.raises(token_cache.DataError, match="changed while being read"):
        load(name, tokenizer)
    assert stores() == []
