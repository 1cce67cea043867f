"""The command data split."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_data import Capture, run, run_json
from tests.tiny import chat, write_rows


def test_split_writes_two_files_that_train_takes(capsys: Capture, tmp_path: Path) -> None:
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmno"]
    rows = [chat(f"{w} x {w} y", w) | {"user": w[0], "label": w[1] == "k"} for w in words]
    data = write_rows(tmp_path / "d.jsonl", rows)
    folder = tmp_path / "s"
    arguments = ("split", data, "--valid-fraction", "0.2", "--output")
    found = run_json(capsys, *arguments, folder, "--group-by", "user", "--stratify-by", "label")
    valid = [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert (
        (found["num_train_rows"], found["num_valid_rows"]) == (len(train), len(valid)) == (40, 10)
    )
    assert found["labels"] == {
        "false": {"train": 32, "valid": 8},
        "true": {"train": 8, "valid": 2},
    }
    assert not {row["user"] for row in train} & {row["user"] for row in valid}
    assert (found["num_groups"], found["largest_group"]) == (10, 5)
    assert found["valid_fraction"] == 0.2 and found["valid"] == str(folder / "valid.jsonl")
    again, other = tmp_path / "s2", tmp_path / "s3"
    run_json(capsys, *arguments, again)
    run_json(capsys, *arguments, other, "--seed", "1")
    run_json(capsys, *arguments, tmp_path / "s4", "--seed", "0")
    texts = [(f / "valid.jsonl").read_bytes() for f in (again, tmp_path / "s4", other)]
    assert texts[0] == texts[1] != texts[2]
    report = run_json(capsys, "check", again)
    assert report["num_valid_rows"] == 10 and report["problems"] == []


def test_split_reports_its_files_and_a_share_that_differs(capsys: Capture, tmp_path: Path) -> None:
    rows = [chat(f"a{i}", "b") | {"user": i % 2} for i in range(10)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    folder = tmp_path / "s"
    code, out, err = run(capsys, "split", data, "--output", folder, "--group-by", "user")
    assert code == 0 and f"{folder}/valid.jsonl  5 rows" in out
    assert "10 rows in 2 sets that stay together, the largest of 5" in out
    assert "50.0% of the rows are set aside, not 10.0%" in err
    code, out, err = run(capsys, "split", data, "--output", folder)
    assert code == 2 and "is in use" in err and out == ""


def test_split_says_which_rows_it_leaves_aside(capsys: Capture, tmp_path: Path) -> None:
    rows = [chat(f"{w} {w}a {w}b {w}c", w) for w in "abcdefgh"]
    write_rows(tmp_path / "f/train.jsonl", [*rows, "nonsense"])
    write_rows(tmp_path / "f/valid.jsonl", rows[:1])
    more = write_rows(tmp_path / "more.jsonl", [chat("other", "words")])
    arguments = ("split", tmp_path / "f", "--output")
    code, _, err = run(capsys, *arguments, tmp_path / "s")
    assert code == 2 and "1 bad row(s)" in err and "data.on_bad_row=skip" in err
    settings = ("--set", "data.on_bad_row=skip")
    source = ("--set", f"data.sources=[{{path: {more}, weight: 3}}]")
    code, out, err = run(capsys, *arguments, tmp_path / "s", *settings, *source)
    assert code == 0 and "train.jsonl  8 rows" in out and "valid.jsonl  1 rows" in out
    assert f"the validation rows in {tmp_path / 'f'}[valid] are left out" in err
    assert f"each row is taken once: weights of sources ({more} 3) are for training" in err
    assert "left out 1 bad row(s) of 10 in" in err and "train.jsonl:9: " in err
