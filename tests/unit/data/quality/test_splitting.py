"""Splits: sizes, groups, labels, seeds, absence of leaks, and unchanged lines."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.data.quality.duplicates import Match, NearIndex
from phi3_lora.data.quality.leakage import find_leaks
from phi3_lora.data.quality.splitting import (
    Split,
    SplitRow,
    read_split_rows,
    split_rows,
    write_split,
)
from phi3_lora.data.rows.conversation import Conversation
from phi3_lora.data.sources.reading import read_conversations
from phi3_lora.data.sources.source import Source
from phi3_lora.errors import DataError
from tests.tiny import chat, write_rows

WORDS = [f"word{i}" for i in range(3000)]


def random_rows(count: int, *, seed: int = 0, **fields: Sequence[Any]) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = [chat(" ".join(rng.choices(WORDS, k=20)), f"answer {i}") for i in range(count)]
    return [
        row | {name: values[i % len(values)] for name, values in fields.items()}
        for i, row in enumerate(rows)
    ]


def write(path: Path, rows: list[Any]) -> list[SplitRow]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_split_rows([Source(path=str(path))], keys=("user", "label"))


def sides_of(path: Path, found: Split) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training and validation rows of a file."""
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    for i, row in enumerate(read_conversations(path)):
        sides[i in found.valid].append(row)
    return sides


def leaks_of(path: Path, found: Split) -> list[Match]:
    train, valid = sides_of(path, found)
    return find_leaks(train, valid, NearIndex.of_rows([*train, *valid]))


def split(rows: list[SplitRow], **settings: Any) -> Split:
    return split_rows(rows, **{"fraction": 0.1, "seed": 0} | settings)


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(100, 0.1, 10), (100, 0.5, 50), (7, 0.1, 1), (10, 0.99, 9), (2, 0.5, 1), (25, 0.1, 2)],
)
def test_the_share_is_the_fraction_and_no_side_is_empty(
    tmp_path: Path, count: int, fraction: float, expected: int
) -> None:
    found = split(write(tmp_path / "d.jsonl", random_rows(count)), fraction=fraction)
    assert len(found.valid) == expected and found.num_rows == found.num_groups == count
    assert found.valid == sorted(set(found.valid)) and found.largest_group == 1


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    rows = write(tmp_path / "d.jsonl", random_rows(200))
    assert split(rows).valid == split(rows).valid
    assert split(rows).valid != split(rows, seed=1).valid
    # The value is the same on every machine: numpy's raw draws are stable.
    assert split(rows).valid[:5] == [4, 11, 55, 73, 76]


def test_near_and_exact_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = random_rows(120)
    for i in range(0, 120, 3):
        text = rows[i]["messages"][0]["content"]
        rows[i + 1] = chat(f"  {text}", f"answer {i}")
        rows[i + 2] = chat(f"Please: {text.upper()}!", f"answer {i}")
    rng.shuffle(rows)
    for seed in range(5):
        read = write(tmp_path / "d.jsonl", rows)
        found = split(read, fraction=0.3, seed=seed)
        assert leaks_of(tmp_path / "d.jsonl", found) == [] and len(found.valid) == 36
        assert (found.num_groups, found.largest_group) == (40, 3)


def test_pairs_that_the_first_search_misses_are_found_when_the_sides_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(100)
    for i in range(0, 100, 2):
        rows[i + 1] = chat(f"Please: {rows[i]['messages'][0]['content']}", f"answer {i}")
    read = write(tmp_path / "d.jsonl", rows)
    monkeypatch.setattr(NearIndex, "duplicates", lambda self, first, last: iter(()))
    found = split(read, fraction=0.4)
    assert len(found.valid) == 40 and leaks_of(tmp_path / "d.jsonl", found) == []
    assert found.largest_group == 2


def test_without_near_duplicates_only_exact_ones_stay_together(tmp_path: Path) -> None:
    texts = ["two red cups to Oslo today please"] * 3
    texts += ["Now two red cups to Oslo today please"]
    rows = write(tmp_path / "d.jsonl", [chat(text, "yes") for text in texts])
    assert split(rows, near=False, fraction=0.5).num_groups == 2
    with pytest.raises(DataError, match=r"all 4 row\(s\) belong together.*--no-near-duplicates"):
        split(rows)


def test_rows_of_one_group_stay_together(tmp_path: Path) -> None:
    users = [f"user{i % 20}" for i in range(200)]
    rows = write(tmp_path / "d.jsonl", random_rows(200, user=users))
    found = split(rows, group_by="user", fraction=0.2)
    chosen = {rows[i].value["user"] for i in found.valid}
    assert len(found.valid) == 40 and len(chosen) == 4
    assert all((users[i] in chosen) == (i in found.valid) for i in range(200))
    assert (found.num_groups, found.largest_group) == (20, 10)


def test_a_group_larger_than_the_share_is_taken_whole_if_none_fits(tmp_path: Path) -> None:
    rows = write(tmp_path / "d.jsonl", random_rows(30, user=["a", "a", "b", "a", "c", "c"]))
    found = split(rows, group_by="user", fraction=0.05)
    assert {rows[i].value["user"] for i in found.valid} == {"b"} and len(found.valid) == 5


def test_each_label_has_the_same_share(tmp_path: Path) -> None:
    labels = ["common"] * 6 + ["rare"] + ["middle"] * 3
    rows = write(tmp_path / "d.jsonl", random_rows(200, label=labels))
    found = split(rows, stratify_by="label", fraction=0.25)
    chosen = Counter(rows[i].value["label"] for i in found.valid)
    assert chosen == {"common": 30, "rare": 5, "middle": 15}
    assert found.labels == {"common": (90, 30), "middle": (45, 15), "rare": (15, 5)}


def test_labels_of_few_rows_share_what_rounding_leaves(tmp_path: Path) -> None:
    rows = write(tmp_path / "d.jsonl", random_rows(40, label=[f"l{i}" for i in range(20)]))
    found = split(rows, stratify_by="label", fraction=0.1)
    assert len(found.valid) == 4
    assert max(valid for _, valid in found.labels.values()) == 1


def test_labels_keep_their_share_while_groups_stay_whole(tmp_path: Path) -> None:
    rows = random_rows(400, user=[f"u{i}" for i in range(100)], label=["x", "x", "x", "y"])
    read = write(tmp_path / "d.jsonl", rows)
    found = split(read, group_by="user", stratify_by="label", fraction=0.2)
    assert found.labels == {"x": (240, 60), "y": (80, 20)}
    chosen = {rows[i]["user"] for i in found.valid}
    assert all((row["user"] in chosen) == (i in found.valid) for i, row in enumerate(rows))


def test_values_of_any_kind_are_groups_and_labels(tmp_path: Path) -> None:
    rows = random_rows(40, label=[True, 1, 2.5, {"a": [1]}])
    found = split(write(tmp_path / "d.jsonl", rows), stratify_by="label", fraction=0.5)
    assert set(found.labels) == {"true", "1", "2.5", '{"a": [1]}'}


def test_rows_that_lack_the_key_are_named_with_the_keys_there_are(tmp_path: Path) -> None:
    rows = random_rows(3, user=["a", None, "b"])
    with pytest.raises(
        DataError, match=r"'user' is missing or null in 1 of 3.*; keys: messages, user"
    ):
        split(write(tmp_path / "d.jsonl", rows), group_by="user")


def test_lines_are_written_as_they_are(tmp_path: Path) -> None:
    lines = [
        b'{"prompt":"caf\\u00e9 1",   "completion": "a", "n": 1.50}',
        '{"completion": "b", "prompt": "caf\u00e9 2", "extra": [1e3]}'.encode(),
        b' {"prompt": "three", "completion": "c"}',
        b'{"prompt": "four", "completion": "d"}',
    ]
    source = tmp_path / "d.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n" + b"\n".join(lines[1:]))
    rows = read_split_rows([Source(path=str(source))])
    folder = tmp_path / "split"
    write_split(rows, split_rows(rows, fraction=0.5, seed=0), folder)
    written = [(folder / name).read_bytes() for name in ("train.jsonl", "valid.jsonl")]
    assert sorted(b"".join(written).splitlines()) == sorted(lines)
    assert all(part.endswith(b"\n") and b"\r" not in part for part in written)
    places = [lines.index(line) for line in written[0].splitlines()]
    assert len(places) == 2 and places == sorted(places), "in the order of the rows"
    assert len(read_conversations(folder)) == 2


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl.gz"])
def test_other_formats_become_json_lines_of_all_their_columns(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"text \u00e9 {i}", "label": f"l{i}"} for i in range(6)]
    path = tmp_path / f"d.{kind}"
    if kind == "csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    read = read_split_rows([Source(path=str(path))])
    write_split(read, split_rows(read, fraction=0.5, seed=0, near=False), tmp_path / "s")
    written = (tmp_path / "s/train.jsonl").read_text() + (tmp_path / "s/valid.jsonl").read_text()
    assert sorted(json.loads(line)["text"] for line in written.splitlines()) == [
        row["text"] for row in rows
    ]
    assert all(json.loads(line) in rows for line in written.splitlines())


def test_every_bad_row_is_named_and_nothing_is_split(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + '\nnonsense\n{"a": 1}\n')
    with pytest.raises(DataError, match=r"2 bad row\(s\)[^$]*:2: not JSON[^$]*:3: needs"):
        read_split_rows([Source(path=str(path))])
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows to split"):
        read_split_rows([Source(path=str(tmp_path / "e.jsonl"))])


def test_bad_rows_can_be_left_out_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = random_rows(4)
    path.write_text("nonsense\n" + "".join(json.dumps(row) + "\n" for row in rows))
    notes: list[str] = []
    read = read_split_rows([Source(path=str(path))], on_bad_row="skip", notes=notes)
    assert [json.loads(row.line) for row in read] == rows
    (note,) = notes
    assert note.startswith(f"left out 1 bad row(s) of 5 in {path}:\n  {path}:1: not JSON")


def test_one_row_alone_is_told_as_that(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one row: a split needs two"):
        split(write(tmp_path / "d.jsonl", random_rows(1)))


def test_of_a_row_only_what_a_split_needs_is_kept(tmp_path: Path) -> None:
    """All rows are in memory: 4 KB per row would be 4 GB for a million rows."""
    rows = random_rows(2000, user=["a", "b"], other=["x" * 500])
    tracemalloc.start()
    read = write(tmp_path / "d.jsonl", rows)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    texts = sum(len(row.line) + len(row.text) for row in read)
    assert read[0].value == {"user": "a"}
    assert kept - texts < 900 * len(read)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    rows = write(tmp_path / "d.jsonl", random_rows(4))
    (tmp_path / "s").mkdir()
    (tmp_path / "s/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is in use"):
        write_split(rows, split(rows, fraction=0.5), tmp_path / "s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["notes.txt"]


def test_rows_that_one_file_cannot_hold_are_not_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    write_rows(tmp_path / "b.jsonl", [chat("a", "b")])
    write_rows(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    sources = {name: Source(path=str(tmp_path / f"{name}.jsonl")) for name in "abc"}
    with pytest.raises(DataError, match="one file cannot hold") as caught:
        read_split_rows([sources["a"], sources["b"]])
    assert f"{tmp_path}/a.jsonl: alpaca" in str(caught.value)
    assert f"{tmp_path}/b.jsonl: messages" in str(caught.value)
    assert len(read_split_rows([sources["b"], sources["c"]])) == 2, "chat formats mix"
    mapped = Source(path=str(tmp_path / "c.jsonl"), columns={"system": "s"})
    with pytest.raises(DataError, match=r"columns \{system: s\}"):
        read_split_rows([sources["b"], mapped])
