"""data clean: what is left, what was done, and that it can be taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_lora.data.records import read_conversations
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
    # Backwards, each change gives the row as it was.
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
        (("--max-tokens", "5"), "need a tokenizer"),
        (("--pattern", "("), "no regular expression"),
        (("--min-chars", "9", "--max-chars", "3"), "no row could stay"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_is_written(
    capsys: Capture, tmp_path: Path, words: tuple[str, ...], phrase: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    code, _, err = run(capsys, "data", "clean", data, "--output", tmp_path / "c", *words)
    assert code == 2 and phrase in err and not (tmp_path / "c").exists()
    code, _, err = run(capsys, "data", "clean", data, "--output", tmp_path, "--empty")
    assert code == 2 and "is in use" in err
