from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_lora import load
from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import group
from tests.tiny import chat, write_model, write_rows

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    code = run_reporting_faults(group, [*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out or "{}"), captured.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [chat("q", "a"), {"messages": 3}, chat("r", "b"), chat("tool <|end|>", "c")]
    calls = [{"function": {"name": "add", "arguments": {}}}]
    rows.append(
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": calls},
            ]
        }
    )
    return write_rows(tmp_path / "d.jsonl", rows)


def test_train_stops_at_bad_rows_or_leaves_them_out(
    capsys: Capture, tmp_path: Path, data: Path
) -> None:
    model = write_model(tmp_path / "model")
    arguments = ("train", "--model", model, "--data", data, "--output", tmp_path / "r", "--dry-run")
    code, _, err = run(capsys, *arguments)
    assert code == 2 and f"{data}:2: `messages` must be a list" in err
    code, facts, err = run(capsys, *arguments, "--on-bad-row", "skip")
    assert code == 0 and facts["num_documents"] == 3
    assert f"skipped 1 bad row(s) of 5 in {data}:\n  {data}:2: " in err
    # The template has no place for calls, which is known only once it writes them.
    assert f"{data}:5: the chat template leaves out" in err


def test_evaluate_leaves_bad_rows_out(capsys: Capture, tmp_path: Path, data: Path) -> None:
    model = write_model(tmp_path / "model")
    arguments = ("evaluate", "--model", model, "--data", data, "--device", "cpu")
    code, _, err = run(capsys, *arguments)
    assert code == 2 and f"{data}:2: " in err
    code, found, err = run(capsys, *arguments, "--on-bad-row", "skip")
    assert code == 0 and found["num_documents"] == 3 and f"{data}:5: " in err
    code, found, err = run(capsys, *arguments, "--on-bad-row", "skip", "--limit", "1")
    assert code == 0 and found["num_documents"] == 1 and f"{data}:2: " in err


def test_plain_text_is_scored_but_not_answered(capsys: Capture, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    path = tmp_path / "d.txt"
    path.write_text("one line\nanother\n")
    code, found, err = run(
        capsys, "evaluate", "--model", model, "--data", path, "--device", "cpu", "--generate"
    )
    assert code == 0, err
    assert found["num_documents"] == 2 and found["num_answers"] == 0
    assert f"note: {path}: rows of plain text: every token is in the loss" in err


@pytest.mark.parametrize(("loss_on", "loss_tokens"), [("assistant", 5), ("last", 3), ("all", 13)])
def test_evaluate_scores_the_tokens_in_the_loss(
    capsys: Capture, tmp_path: Path, loss_on: str, loss_tokens: int
) -> None:
    model = write_model(tmp_path / "model")
    messages = [*chat("q", "a")["messages"], *chat("r", "bc")["messages"]]
    path = write_rows(tmp_path / "d.jsonl", [{"messages": messages}])
    arguments = ("evaluate", "--model", model, "--data", path, "--device", "cpu")
    code, found, err = run(capsys, *arguments, "--loss-on", loss_on)
    assert code == 0, err
    with load(str(model), device="cpu") as loaded:
        scores = loaded.score(str(path), loss_on=loss_on)
    assert found == scores.to_dict()
    assert found["loss_tokens"] == loss_tokens
    assert ("the loss counts on" in err) is (loss_on != "assistant")
