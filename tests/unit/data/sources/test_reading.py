from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.data.rows.conversation import BadRow, Conversation
from phi3_lora.data.sources.reading import iterate_rows, read_conversations, read_rows
from phi3_lora.errors import DataError
from tests.tiny import chat, write_rows

GOOD = chat("q", "a")
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "phrase"),
    [
        ("{not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [}', "not JSON"),
        ([1], "must be a JSON object, got list"),
        (None, "must be a JSON object, got NoneType"),
        ({}, "its keys: none"),
        ({"q": "x", "a": "y"}, "or `text`; its keys: a, q; rename with data.columns"),
        ({"prompt": "x"}, "its keys: prompt"),
        ({"messages": []}, "at least one message"),
        ({"messages": {}}, "`messages` must be a list"),
        ({"messages": None}, "needs `messages`"),
        ({"messages": ["x"]}, "message 1 must be an object, got str"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot' is not one of"),
        ({"messages": [{"content": "x"}]}, "role None is not one of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "is not one of"),
        ({"messages": [{"role": "user"}]}, "content must be a string or a list of text parts"),
        ({"messages": [USER, {**ANSWER, "content": 3}]}, "message 2 (assistant): content must be"),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "message 2: the assistant's answer is"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "answer is empty"),
        ({"messages": [USER, ANSWER, SYSTEM]}, "message 3: a system message must come first"),
        ({"messages": [SYSTEM, SYSTEM, USER, ANSWER]}, "message 2: a system message must come"),
        ({"messages": [ANSWER, USER]}, "turn 1: roles must alternate, user first"),
        ({"messages": [SYSTEM, ANSWER]}, "turn 1: roles must alternate, user first"),
        ({"messages": [USER, USER, ANSWER]}, "turn 2: roles must alternate"),
        ({"messages": [USER, ANSWER, ANSWER]}, "turn 3: roles must alternate"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [SYSTEM]}, "no assistant turn"),
        ({"messages": [{**USER, "content": "\ud83d"}, ANSWER]}, "half a surrogate pair"),
        ({"prompt": "x", "completion": ""}, "answer is empty"),
        ({"prompt": 1, "completion": "y"}, "message 1 (user): content must be a string or"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, row: Any, phrase: str) -> None:
    path = tmp_path / "chats.jsonl"
    bad = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(GOOD)}\n{bad}\n{json.dumps(GOOD)}\n")
    with pytest.raises(DataError) as problem:
        read_conversations(path)
    lines = str(problem.value).splitlines()
    assert lines[0].startswith("1 bad row(s)")
    assert len(lines) == 2 and f"{path}:2: " in lines[1] and phrase in lines[1]


def test_other_keys_are_left_out(tmp_path: Path) -> None:
    row = {"messages": [{**SYSTEM, "name": "x"}, USER, ANSWER], "id": 7}
    path = write_rows(tmp_path / "d.jsonl", [row])
    assert read_conversations(path)[0].messages == (SYSTEM, USER, ANSWER)


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    row = json.dumps(chat("größe", "ä\u2028b"), ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \t\r\n" + row)
    found = read_conversations(path)
    assert [c.source for c in found] == [f"{path}:1", f"{path}:4"]
    assert found[0].messages[1]["content"] == "ä\u2028b"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\n"])
def test_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="has no rows"):
        read_conversations(path)


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + good + b'\n{"x": "\xe4"}\n')
    with pytest.raises(DataError) as problem:
        read_conversations(path)
    assert f"{path}:3: not UTF-8 (byte 8 of the line)" in str(problem.value)


@pytest.mark.parametrize("is_folder", [False, True])
def test_missing_file_and_folder_without_data_are_refused(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path / "x.jsonl"
    if is_folder:
        path.mkdir()
    with pytest.raises(DataError, match="holds no file of" if is_folder else "no such data file"):
        read_conversations(path)


def test_one_bad_row_of_10000_is_named(tmp_path: Path) -> None:
    rows: list[Any] = [GOOD] * 10_000
    rows[7_654] = {"messages": [USER]}
    path = write_rows(tmp_path / "many.jsonl", rows)
    with pytest.raises(DataError) as problem:
        read_conversations(path)
    assert str(problem.value).splitlines()[1].strip().startswith(f"{path}:7655: ")


def test_more_than_20_problems_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [{}] * 1_234)
    with pytest.raises(DataError) as problem:
        read_conversations(path)
    lines = str(problem.value).splitlines()
    assert lines[0].startswith("1,234 bad row(s)")
    assert len(lines) == 22 and lines[-1].strip() == "... and 1,214 more"


def test_skipping_keeps_the_good_rows_and_notes_the_first_20_bad_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "some.jsonl", [GOOD, *[{}] * 30, GOOD])
    found = read_rows(path, on_bad_row="skip")
    assert [c.source for c in found.conversations] == [f"{path}:1", f"{path}:32"]
    lines = found.notes[0].splitlines()
    assert lines[0] == f"skipped 30 bad row(s) of 32 in {path}:"
    assert len(lines) == 22 and lines[-1].strip() == "... and 10 more"


def test_skipping_every_row_is_an_error_that_shows_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [{}])
    with pytest.raises(DataError, match="no usable row is left") as problem:
        read_rows(path, on_bad_row="skip")
    assert f"{path}:1: needs `messages`" in str(problem.value)


def test_rows_come_one_at_a_time_with_the_bad_ones_among_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mixed.jsonl", [GOOD, [1], GOOD])
    kinds = [type(row) for row in iterate_rows(path)]
    assert kinds == [Conversation, BadRow, Conversation]
