"""Rows in memory give the results of equal rows in a file, in every function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import phi3_lora
from tests.tiny import chat, write_model, write_rows

ROWS = [chat("one", "a first"), chat("two", "a second"), chat("three", "a third")]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "model"))


@pytest.fixture(params=["list", "data set"])
def rows(request: pytest.FixtureRequest) -> Any:
    if request.param == "list":
        return ROWS
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def test_check_finds_the_same(rows: Any, file: Path, model: str) -> None:
    found = phi3_lora.check_data(rows, model=model, near_duplicates=False).to_dict()
    expected = phi3_lora.check_data(file, model=model, near_duplicates=False).to_dict()
    assert {**found, "files": []} == {**expected, "files": []}
    twice = phi3_lora.check_data([*ROWS, ROWS[1]], near_duplicates=False)
    assert [(problem.line, problem.kind) for problem in twice.problems] == [(4, "duplicate")]


def test_check_sees_rows_to_validate_on(model: str) -> None:
    report = phi3_lora.check_data(ROWS, valid=ROWS[:1], near_duplicates=False)
    assert [problem.kind for problem in report.problems] == ["leak"]


def test_preview_shows_the_same_tokens(rows: Any, file: Path, model: str) -> None:
    found = phi3_lora.preview_data(rows, model=model).to_dict()["documents"]
    expected = phi3_lora.preview_data(file, model=model).to_dict()["documents"]
    assert [d["token_ids"] for d in found] == [d["token_ids"] for d in expected]
    assert [d["loss_mask"] for d in found] == [d["loss_mask"] for d in expected]


def test_settings_apply_to_rows(model: str) -> None:
    rows = [{"question": "q", "reply": "an answer"}]
    columns = {"prompt": "question", "completion": "reply"}
    found = phi3_lora.preview_data(rows, model=model, config={"data": {"columns": columns}})
    (row,) = found.rows
    learnt = found.tokenizer.decode(row.document.tokens[row.document.supervised])
    assert learnt == "an answer"


def test_split_and_clean_write_the_same_files(rows: Any, file: Path, tmp_path: Path) -> None:
    for name, data in (("of_rows", rows), ("of_file", file)):
        phi3_lora.split_data(
            data, output=tmp_path / name, valid_fraction=0.34, near_duplicates=False
        )
        phi3_lora.clean_data(data, output=tmp_path / f"{name}_clean", duplicates=True)
    for name in ("", "_clean"):
        texts = [
            [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
            for folder in (tmp_path / f"of_rows{name}", tmp_path / f"of_file{name}")
        ]
        assert texts[0] == texts[1]


def test_a_run_plans_the_same_steps(rows: Any, file: Path, model: str, tmp_path: Path) -> None:
    settings: Any = {"model": model, "output_dir": tmp_path / "run", "max_steps": 3}
    found = phi3_lora.dry_run(data=rows, valid=ROWS[:1], **settings).to_dict()
    expected = phi3_lora.dry_run(
        data=file, valid=write_rows(tmp_path / "valid.jsonl", ROWS[:1]), **settings
    ).to_dict()
    assert found["plan_hash"] == expected["plan_hash"]
    assert found["num_eval_documents"] == 1
