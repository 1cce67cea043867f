"""The command data clean: the rows left, the changes, and their reversal."""

from __future__ import annotations

import datetime
import json
import os
import threading
from pathlib import Path

import pytest

from phi3_lora.data.sources.reading import read_conversations
from tests.cli.test_contract import Capture, run, run_json
from tests.tiny import chat, write_rows

ROWS = [
    chat("Two red cups to Oslo.", "Noted."),
    chat("Two red cups  to Oslo. ", "Noted."),
    {"messages": [*chat("a", "b")["messages"], {"role": "user", "content": "c\u00a0d"}]},
    {
        "messages": [
            {"role": "system", "content": " "},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two", "weight": 0},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four ", "weight": 1},
        ]
    },
    chat("secret 123", "no"),
]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_is_counted_and_each_change_can_be_taken_back(
    capsys: Capture, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    before = data.read_bytes()
    found = run_json(
        *(capsys, "data", "clean", data, "--output", tmp_path / "c", "--white-space"),
        *("--empty", "--duplicates", "--pattern", r"\d{3}"),
    )
    assert (found["rows"], found["kept"]) == (5, 3)
    assert found["steps"] == {
        "white_space": {"changed": 3, "dropped": 0},
        "empty": {"changed": 1, "dropped": 0},
        "patterns": {"changed": 0, "dropped": 1},
        "duplicates": {"changed": 0, "dropped": 1},
    }
    assert data.read_bytes() == before
    kept = read_conversations(tmp_path / "c/train.jsonl")
    assert [row.messages[-1]["content"] for row in kept] == ["Noted.", "c d", "four"]
    assert kept[2].weights == (None, False, None, True)
    # Each change, taken back, gives the row before it.
    rows = {i: row for i, row in enumerate(lines(tmp_path / "c/train.jsonl"))}
    current = {json.dumps(row): row for row in rows.values()}
    for change in reversed(lines(tmp_path / "c/changes.jsonl")):
        if change["after"] is not None:
            assert json.dumps(change["after"]) in current
            del current[json.dumps(change["after"])]
        current[json.dumps(change["before"])] = change["before"]
    texts = [[m["content"] for m in row["messages"]] for row in current.values()]
    assert sorted(texts) == sorted([m["content"] for m in row["messages"]] for row in ROWS)
    assert {c["source"] for c in lines(tmp_path / "c/changes.jsonl")} == {
        f"{data}:{number}" for number in (2, 3, 4, 5)
    }


def test_plain_text_stays_plain_text(capsys: Capture, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "some  text "}, {"text": "more"}])
    run_json(capsys, "data", "clean", data, "--output", tmp_path / "c", "--white-space")
    kept = read_conversations(tmp_path / "c/train.jsonl")
    assert [row.whole for row in kept] == [True, True]
    assert kept[0].messages[0]["content"] == "some  text"


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        ((), "no step is chosen"),
        (("--max-tokens", "5"), "--max-tokens need --model"),
        (("--pattern", "("), "is not a regular expression"),
        (("--min-chars", "9", "--max-chars", "3"), "no row could stay"),
    ],
)
def test_an_impossible_request_is_refused_and_nothing_is_written(
    capsys: Capture, tmp_path: Path, words: tuple[str, ...], phrase: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    code, _, err = run(capsys, "data", "clean", data, "--output", tmp_path / "c", *words)
    assert code == 2 and phrase in err and not (tmp_path / "c").exists()
    code, _, err = run(capsys, "data", "clean", data, "--output", tmp_path, "--empty")
    assert code == 2 and "is in use" in err


def cleaned_lines(capsys: Capture, folder: Path, *words: object) -> list[dict]:
    run_json(capsys, "data", "clean", *words, "--output", folder, "--white-space")
    return lines(folder / "train.jsonl")


def test_the_tools_of_a_row_survive(capsys: Capture, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "order"}}]
    rows = [
        chat("a ", "b") | {"tools": tools},
        chat("a ", "b") | {"system": "s", "tools": json.dumps(tools)},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cleaned_lines(capsys, tmp_path / "c", data)
    kept = read_conversations(tmp_path / "c/train.jsonl")
    before = read_conversations(data)
    assert [row.messages[0] for row in kept] == [row.messages[0] for row in before]
    assert json.loads(kept[0].messages[0]["tools"]) == tools
    assert [row.messages[1]["content"] for row in kept] == ["a", "a"]


def test_plain_text_and_messages_are_written_apart(capsys: Capture, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [chat("a ", "b"), chat("c", "d")])
    write_rows(tmp_path / "b.jsonl", [{"text": "e "}])
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{train: {tmp_path}/a.jsonl, sources: [{tmp_path}/b.jsonl]}}")
    out = tmp_path / "c"
    found = run_json(capsys, "data", "clean", "-c", config, "--output", out, "--white-space")
    assert found["files"] == ["train.jsonl", "train-text.jsonl"]
    kept = read_conversations(out)
    assert sorted(row.messages[0]["content"] for row in kept) == ["a", "c", "e"]
    assert sorted(row.whole for row in kept) == [False, False, True]


@pytest.mark.parametrize(
    ("row", "others"),
    [
        ({"prompt": "a", "completion": "b", "customer": 7}, {"customer": 7}),
        ({"text": "a", "label": "b", "group": None}, {"label": "b"}),
        ({"instruction": "a", "input": "c", "output": "b", "id": "x"}, {"id": "x"}),
        (chat("a", "b") | {"prompt": "p", "meta": {"k": [1]}}, {"prompt": "p", "meta": {"k": [1]}}),
        (chat("a", "b") | {"note": "\ud800"}, {"note": "\ud800"}),
        ({"text": "a", "id": 1}, {"id": 1}),
    ],
)
def test_other_keys_of_a_row_stay_for_a_split(
    capsys: Capture, tmp_path: Path, row: dict, others: dict
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"bad": 1}, row, row])
    config = ("--set", "data.on_bad_row=skip")
    for found in cleaned_lines(capsys, tmp_path / "c", data, *config):
        assert {k: v for k, v in found.items() if k not in ("messages", "text")} == others
    before = read_conversations(write_rows(tmp_path / "same.jsonl", [row, row]))
    kept = read_conversations(tmp_path / "c/train.jsonl")
    assert [r.messages for r in kept] == [r.messages for r in before]


def test_mapped_columns_are_not_kept_beside_their_new_names(
    capsys: Capture, tmp_path: Path
) -> None:
    rows = [{"q": "a ", "chosen": "b", "rejected": "c", "user": 1}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    columns = ("--set", "data.columns={prompt: q, completion: chosen}")
    (found,) = cleaned_lines(capsys, tmp_path / "c", data, *columns)
    assert found == chat("a", "b") | {"user": 1}


def test_rows_of_a_table_with_dates_and_nan_become_json(capsys: Capture, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    row = chat("a", "b") | {"day": datetime.date(2026, 1, 2), "score": float("nan")}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    (found,) = cleaned_lines(capsys, tmp_path / "c", tmp_path / "d.parquet")
    assert (found["day"], found["score"]) == ("2026-01-02", None)


def test_a_pipe_is_read_once(capsys: Capture, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = json.dumps(chat("a ", "b") | {"user": 1})
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    assert cleaned_lines(capsys, tmp_path / "c", pipe) == [chat("a", "b") | {"user": 1}]
    writer.join()
    (change,) = lines(tmp_path / "c/changes.jsonl")
    assert change["before"] == chat("a ", "b") | {"user": 1}


def test_a_cleaning_that_leaves_no_row_is_reported(capsys: Capture, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [chat("a", "b")])
    arguments = ("data", "clean", data, "--min-chars", "9", "--output", tmp_path / "c")
    code, out, err = run(capsys, *arguments)
    assert code == 0 and "kept 0 of 1 rows" in out
    assert "no row is left: training needs at least one" in err
