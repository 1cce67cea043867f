"""phi3-lora data: what check and preview say of rows that training shortens or leaves out."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from phi3_lora_cli.data_output import preview_console
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
def test_preview_shows_rows_as_they_are_trained_on(
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


def test_a_preview_whose_reader_leaves_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Left())
    with pytest.raises(BrokenPipeError):
        preview_console().print("x")
