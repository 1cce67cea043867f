"""The reports of data check and data preview on rows that training shortens or drops."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_data import Capture, run, run_json
from tests.tiny import chat, write_model, write_rows


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_check_names_rows_that_training_finds_too_long(
    capsys: Capture, tmp_path: Path, model: Path
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "b"), chat("a", "b" * 30)])
    short = ("--set", "training_config.max_length=20")
    found = run_json(capsys, "check", data, "--model", model, *short, expected=3)
    (problem,) = found["problems"]
    assert (problem["line"], problem["kind"]) == (2, "too-long")
    assert problem["message"] == "36 tokens, more than max_length 20"
    code, _, err = run(capsys, "check", data, "--model", model)
    assert code == 0, err


@pytest.mark.parametrize(
    ("too_long", "training", "lengths"),
    [
        ("drop", "dropped", [14, 36]),
        ("truncate_left", "shortened", [8, 36]),
        ("error", "error", [14, 36]),
    ],
)
def test_preview_shows_rows_as_in_training(
    capsys: Capture, tmp_path: Path, model: Path, too_long: str, training: str, lengths: list[int]
) -> None:
    turns = [*chat("a", "b")["messages"], *chat("c", "de")["messages"]]
    rows = [{"messages": turns}, chat("a", "b" * 30), chat("a", "b")]
    data = write_rows(tmp_path / "d.jsonl", rows)
    settings = ("--set", "training_config.max_length=10", "--set", f"data.too_long={too_long}")
    arguments = ("preview", data, "--model", model, *settings)
    found = run_json(capsys, *arguments)["documents"]
    alone = "error" if too_long == "error" else "dropped"
    assert [row["training"] for row in found] == [training, alone, "kept"]
    assert [len(row["token_ids"]) for row in found[:2]] == lengths
    assert found[0]["remark"] == "14 tokens, more than max_length 10"
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and f"\n{training} in training: 14 tokens, more than max_length 10\n" in out


def test_preview_says_that_a_row_without_loss_is_dropped(
    capsys: Capture, tmp_path: Path, model: Path
) -> None:
    row = chat("a", "b")
    row["messages"][1]["weight"] = 0
    data = write_rows(tmp_path / "d.jsonl", [row])
    (found,) = run_json(capsys, "preview", data, "--model", model)["documents"]
    assert (found["training"], found["remark"]) == ("dropped", "no token is in the loss")


def test_a_preview_into_a_closed_pipe_is_not_an_error(tmp_path: Path, model: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat(f"a{i}", "b" * 400) for i in range(400)])
    arguments = ["data", "preview", str(data), "--model", str(model), "--limit", "400"]
    with subprocess.Popen(
        [sys.executable, "-m", "phi3_lora_cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_many_labels_show_the_largest_and_cannot_control_the_terminal(
    capsys: Capture, tmp_path: Path
) -> None:
    labels = ["often\x1b[31m", "often\x1b[31m", *(f"{i} " + "x" * 80 for i in range(40))]
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    arguments = ("split", data, "--stratify-by", "label", "--no-near-duplicates", "--output")
    code, out, err = run(capsys, *arguments, tmp_path / "s")
    assert code == 0, err
    lines = out.splitlines()
    shown = [line for line in lines if " and " in line and ": " in line]
    assert shown[0].startswith("  often\\x1b[31m: ") and len(shown) == 20
    assert max(map(len, shown)) < 90
    assert "  ... and 21 more labels (--json lists all)" in lines
    assert re.fullmatch(r"  3\d of 41 labels have no row to validate on", lines[-1])
    assert len(run_json(capsys, *arguments, tmp_path / "j")["labels"]) == 41


def test_a_histogram_fits_into_a_narrow_terminal(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat("a" * 9000, "b"), chat("a" * 9001, "b")])
    widths = []
    for columns in (40, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        _, out, _ = run(capsys, "check", data, "--no-near-duplicates")
        widths.append(max(len(line) for line in out.splitlines() if "\u2588" in line))
    assert widths[0] < 40 < widths[1]


def test_split_says_which_settings_its_files_need(capsys: Capture, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"q": "one", "a": "x"}, {"q": "two", "a": "y"}])
    columns = ("--set", "data.columns={prompt: q, completion: a}")
    code, _, err = run(capsys, "split", data, "--output", tmp_path / "s", *columns)
    assert code == 0 and "set data.columns={prompt: q, completion: a} again" in err
    assert run_json(capsys, "check", tmp_path / "s", *columns)["num_rows"] == 2


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_page_needs_the_name_of_a_file(
    capsys: Capture, tmp_path: Path, model: Path, name: str
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat("a", "b")])
    code, out, err = run(capsys, "preview", data, "--model", model, "--html", name)
    assert code == 2 and f"--html must name a file, got {name!r}" in err and out == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf8_gets_escapes(
    tmp_path: Path, model: Path, encoding: str
) -> None:
    data = write_rows(tmp_path / "d.jsonl", [chat("\u05e9", "b")])
    for words in (["check"], ["preview", "--model", str(model)]):
        done = subprocess.run(
            [sys.executable, "-m", "phi3_lora_cli", "data", words[0], str(data), *words[1:]],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert b"\\u27e6b<|end|>\\u27e7" in done.stdout
