"""The cache of tokens: equal documents, notes and plans as in memory; written once and safely."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_lora.data.chat.tokenizer import ChatTokenizer
from phi3_lora.data.documents import cache as token_cache
from phi3_lora.data.documents.batch import documents_digest
from phi3_lora.data.documents.dataset import load_splits, resolve_data
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.documents.selection import Dataset
from phi3_lora.data.documents.store import DocumentStore, document_lengths, num_loss_tokens
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import DataError, StorageError
from phi3_lora.storage.cache import cache_root
from phi3_lora.training.plan.fixed import Plan
from tests.tiny import TEMPLATE, chat, write_rows, write_tokenizer

Splits = tuple[Dataset, Dataset | None]


pytestmark = pytest.mark.usefixtures("empty_cache")


def load(
    data: str | Path,
    tokenizer: ChatTokenizer,
    *,
    cached: bool,
    valid: str | None = None,
    more: tuple[Source, ...] = (),
    said: list[str] | None = None,
    **changes: Any,
) -> Splits:
    settings = {name: changes.pop(name) for name in ("valid_fraction", "seed") if name in changes}
    settings = {"valid_fraction": 0.0, "seed": 3, **settings}
    encoding = Encoding(**{"max_length": 60, **changes})
    said = [] if said is None else said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CACHE_FROM_BYTES", 0 if cached else 10**9)
        files = resolve_data(str(data), valid, more=more)
        return load_splits(files, tokenizer, encoding, note=said.append, **settings)


def size_of(dataset: Dataset) -> tuple[int, int]:
    lengths = document_lengths(dataset.documents)
    return int(lengths.sum()), num_loss_tokens(dataset.documents)


def rows_of_all_kinds(count: int = 300) -> list[Any]:
    """Return good rows, and one row for each kind of note."""
    odd = {
        5: chat("q", "a" * 100),
        6: {"messages": [*chat("q", "b" * 50)["messages"], *chat("r", "c")["messages"]]},
        7: chat("say <|end|>", "no"),
        8: chat("q", "  a"),
        9: {"messages": [{"role": "user", "content": "q"}, *chat("", "x")["messages"][1:]]},
        10: chat("q", "a") | {"messages": [{**m, "weight": 0} for m in chat("", "a")["messages"]]},
        11: {"prompt": "no completion"},
        12: chat("größe", "🦊"),
    }
    return [odd.get(i % 40, chat(f"q{i}", f"a{i}" * (i % 7 + 1))) for i in range(count)]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a share to validate on": {"valid_fraction": 0.2},
    "shortened from the left": {"too_long": "truncate_left"},
    "shortened from the right": {"too_long": "truncate_right", "valid_fraction": 0.1},
    "the last answer": {"loss_on": "last"},
    "all tokens": {"loss_on": "all"},
    "the context": {"context": 40},
}


def plan_of(split: Dataset, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"rows_per_step": 4, "num_epochs": 2, "max_steps": -1, "seed": 3}
    return Plan(split.documents, **{**settings, **changes})


def assert_same(found: Splits, expected: Splits) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is None or theirs is None:
            continue
        assert isinstance(ours.documents, DocumentStore) and isinstance(theirs.documents, list)
        assert ours.notes == theirs.notes
        assert size_of(ours) == size_of(theirs)
        assert documents_digest(ours.documents) == documents_digest(theirs.documents)
        assert plan_of(ours).hash() == plan_of(theirs).hash()
        packed: dict[str, Any] = {"row_tokens": 64}
        assert plan_of(ours, **packed).hash() == plan_of(theirs, **packed).hash()
        for a, b in zip(ours.documents, theirs.documents, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.supervised, b.supervised)
            assert (a.source, a.remarks, a.loss_tokens) == (b.source, b.remarks, b.loss_tokens)


@pytest.mark.parametrize("case", CASES)
def test_the_cache_and_memory_give_the_same_plan_and_notes(
    tmp_path: Path, tokenizer: ChatTokenizer, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi3_lora.data.documents.encoding._ROWS_AT_ONCE", 37)
    path = write_rows(tmp_path / "data.jsonl", rows_of_all_kinds())
    options = {"on_bad_row": "skip", **CASES[case]}
    expected = load(path, tokenizer, cached=False, **options)
    assert len(expected[0].notes) >= 3
    made = load(path, tokenizer, cached=True, **options)
    assert_same(made, expected)
    assert_same(load(path, tokenizer, cached=True, **options), expected)


def test_weights_and_a_file_to_validate_on_are_the_same_in_the_cache(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    first = write_rows(tmp_path / "a.jsonl", [chat(f"a{i}", "x") for i in range(30)])
    second = write_rows(tmp_path / "b.jsonl", [chat(f"b{i}", "y" * (i * 5)) for i in range(1, 31)])
    valid = write_rows(tmp_path / "v.jsonl", [chat(f"v{i}", "z") for i in range(9)])
    options: dict[str, Any] = {
        "more": (Source(path=str(second), weight=2.5),),
        "valid": str(valid),
    }
    expected = load(first, tokenizer, cached=False, **options)
    assert_same(load(first, tokenizer, cached=True, **options), expected)
    assert expected[1] is not None and len(expected[1].documents) == 9


FAILURES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "bad rows": ([chat("q", "a"), {}, *[[i] for i in range(30)]], {}),
    "rows that cannot be rendered": ([chat("q", "a"), *[chat("q", " ")] * 30], {}),
    "rows that are too long": (
        [chat("q", "a"), *[chat("q", "a" * 99)] * 30],
        {"too_long": "error"},
    ),
    "nothing to learn": ([chat("q", "a" * 99)] * 3, {}),
    "no rows": ([], {}),
    "no usable row": ([{}, {}], {"on_bad_row": "skip"}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_unusable_data_gives_the_same_error_in_the_cache(
    tmp_path: Path, tokenizer: ChatTokenizer, failure: str
) -> None:
    rows, options = FAILURES[failure]
    path = write_rows(tmp_path / "data.jsonl", rows)
    messages = []
    for cached in (False, True, True):
        with pytest.raises(DataError) as problem:
            load(path, tokenizer, cached=cached, **options)
        messages.append(str(problem.value))
    assert messages[0] == messages[1] == messages[2]


def stores() -> list[Path]:
    return sorted(p for p in (cache_root() / "tokens").iterdir() if p.is_dir())


def test_tokens_are_made_once_and_their_folder_is_noted(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "data.jsonl", [chat(f"q{i}", "a") for i in range(9)])
    made: list[str] = []
    load(path, tokenizer, cached=True, said=made)
    assert made == [f"tokenising {path}, once, into {stores()[0]}"]

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("was tokenised again")

    monkeypatch.setattr(ChatTokenizer, "encode_rows", fails)
    found: list[str] = []
    load(path, tokenizer, cached=True, said=found, seed=9, valid_fraction=0.3)
    assert found == [f"tokens of {path} found in {stores()[0]}"]


@pytest.mark.parametrize(
    "changes",
    [{"max_length": 50}, {"loss_on": "all"}, {"too_long": "truncate_left"}, {"on_bad_row": "skip"}],
)
def test_a_setting_that_changes_documents_makes_other_tokens(
    tmp_path: Path, tokenizer: ChatTokenizer, changes: dict[str, Any]
) -> None:
    path = write_rows(tmp_path / "data.jsonl", [chat("q", "a")])
    load(path, tokenizer, cached=True)
    load(path, tokenizer, cached=True, **changes)
    assert len(stores()) == 2


@pytest.mark.parametrize("changed", ["size", "time", "name", "format", "columns"])
def test_another_file_or_another_reading_of_it_makes_other_tokens(
    tmp_path: Path, tokenizer: ChatTokenizer, changed: str
) -> None:
    rows = [{"prompt": "q", "completion": "a", "other": "b"}] * 2
    path = write_rows(tmp_path / "data.jsonl", rows)
    load(path, tokenizer, cached=True)
    source = Source(path=str(path))
    if changed == "size":
        write_rows(path, rows * 2)
    elif changed == "time":
        os.utime(path, ns=(1, 1))
    elif changed == "name":
        source = Source(path=str(path.rename(tmp_path / "other.jsonl")))
    elif changed == "format":
        source = Source(path=str(path), format="prompt-completion")
    else:
        source = Source(path=str(path), columns={"completion": "other"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "CACHE_FROM_BYTES", 0)
        files = resolve_data(source)
        load_splits(files, tokenizer, Encoding(max_length=60), valid_fraction=0.0, seed=3)
    assert len(stores()) == 2


@pytest.mark.parametrize("changed", ["template", "tokens"])
def test_another_tokenizer_makes_other_tokens(
    tmp_path: Path, tokenizer: ChatTokenizer, changed: str
) -> None:
    path = write_rows(tmp_path / "data.jsonl", [chat("q", "a")])
    load(path, tokenizer, cached=True)
    folder = tmp_path / "other"
    folder.mkdir()
    if changed == "template":
        write_tokenizer(folder, template=TEMPLATE + " ")
    else:
        write_tokenizer(folder, eats_space=False)
    load(path, ChatTokenizer(folder, vocab_size=264), cached=True)
    assert len(stores()) == 2


def damage(folder: Path, how: str) -> None:
    if how == "no meta":
        (folder / "meta.json").unlink()
    elif how == "cut":
        data = (folder / "tokens").read_bytes()
        (folder / "tokens").write_bytes(data[:-4])
    elif how == "cut, and said so":
        meta = json.loads((folder / "meta.json").read_text())
        data = (folder / "tokens").read_bytes()
        (folder / "tokens").write_bytes(data[:-4])
        meta["sizes"]["tokens"] -= 4
        (folder / "meta.json").write_text(json.dumps(meta))
    elif how == "other version":
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, "version": 0}))
    else:
        (folder / "meta.json").write_text("[1")


@pytest.mark.parametrize("how", ["no meta", "cut", "cut, and said so", "other version", "no JSON"])
def test_a_damaged_store_is_written_again(
    tmp_path: Path, tokenizer: ChatTokenizer, how: str
) -> None:
    path = write_rows(tmp_path / "data.jsonl", rows_of_all_kinds())
    expected = load(path, tokenizer, cached=False, on_bad_row="skip")
    load(path, tokenizer, cached=True, on_bad_row="skip")
    damage(stores()[0], how)
    said: list[str] = []
    found = load(path, tokenizer, cached=True, on_bad_row="skip", said=said)
    assert said[0].startswith("tokenising")
    assert_same(found, expected)


def test_runs_that_start_at_once_share_the_work(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "CACHE_FROM_BYTES", 0)
    path = write_rows(tmp_path / "data.jsonl", [chat(f"q{i}", "a") for i in range(50)])
    files = resolve_data(str(path))
    inside, go_on = threading.Event(), threading.Event()
    encode = token_cache.encode_in_parts

    def slowly(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(20)
        return encode(*arguments)

    monkeypatch.setattr(token_cache, "encode_in_parts", slowly)
    said: list[list[str]] = [[], []]
    results: list[Splits | None] = [None, None]

    def run(i: int) -> None:
        def note(text: str) -> None:
            said[i].append(text)
            if text.startswith("waiting"):
                go_on.set()

        results[i] = load_splits(
            files, tokenizer, Encoding(max_length=60), valid_fraction=0.0, seed=0, note=note
        )

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert [text.split()[0] for text in said[0]] == ["tokenising"]
    assert [text.split()[0] for text in said[1]] == ["waiting", "tokens"]
    first, second = results
    assert first is not None and second is not None
    assert documents_digest(first[0].documents) == documents_digest(second[0].documents)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "data.jsonl", [chat("q", "a")])
    encode = token_cache.encode_in_parts

    def changing(*arguments: Any) -> Any:
        yield from encode(*arguments)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(token_cache, "encode_in_parts", changing)
    with pytest.raises(DataError, match="changed while being read"):
        load(path, tokenizer, cached=True)
    assert stores() == []


def test_a_template_that_asks_for_the_time_is_not_cached(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template="{{ strftime_now('%Y') }}" + TEMPLATE)
    tokenizer = ChatTokenizer(tmp_path, vocab_size=264)
    path = write_rows(tmp_path / "data.jsonl", [chat("q", "a")])
    train, _ = load(path, tokenizer, cached=True)
    assert isinstance(train.documents, list)


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "data.jsonl", [chat("q", "a")])
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    with pytest.raises(StorageError, match="set XDG_CACHE_HOME to a folder with room"):
        load(path, tokenizer, cached=True)


def test_lengths_and_slices_of_documents_on_the_disk(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = write_rows(tmp_path / "data.jsonl", [chat("q", "a" * i) for i in range(1, 9)])
    documents = load(path, tokenizer, cached=True)[0].documents
    assert document_lengths(documents).tolist() == [len(d.tokens) for d in documents]
    assert [d.source for d in documents[2:5]] == [f"{path}:{i}" for i in (3, 4, 5)]
    assert documents[-1].source == f"{path}:8"
    with pytest.raises(IndexError):
        documents[8]


def test_a_plan_of_documents_on_the_disk_reads_no_document(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "data.jsonl", [chat("q", "a" * i) for i in range(1, 9)])
    train = load(path, tokenizer, cached=True)[0]

    def fails(*_: object) -> None:
        raise AssertionError("a document was read")

    monkeypatch.setattr(DocumentStore, "__getitem__", fails)
    num_tokens, loss_tokens = size_of(train)
    assert num_tokens > loss_tokens > 0
    assert len(plan_of(train, row_tokens=64).hash()) == 64


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_a_file_whose_name_is_no_utf8_is_cached_and_named(
    tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    path = write_rows(Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.jsonl")), [chat("q", "a")])
    stored = [load(path, tokenizer, cached=cached)[0].documents[0] for cached in (False, True)]
    assert stored[0].source == stored[1].source == f"{path}:1"


@pytest.mark.parametrize("name", ["a.jsonl", "c.jsonl"])
def test_a_folder_whose_files_come_or_go_while_they_are_read_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "folder"
    for kept in ("a.jsonl", "b.jsonl"):
        write_rows(folder / kept, [chat("q", "a")])
    encode = token_cache.encode_in_parts

    def changing(*arguments: Any) -> Any:
        path = folder / name
        path.unlink() if path.exists() else write_rows(path, [chat("q", "a")])
        yield from encode(*arguments)

    monkeypatch.setattr(token_cache, "encode_in_parts", changing)
    with pytest.raises(DataError, match="changed while being read"):
        load(folder, tokenizer, cached=True)
