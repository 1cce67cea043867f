"""Runs on streamed data: their numbers equal those of other runs, and every fault is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.program import phi3_lora_here
from tests.e2e.streams import ROWS
from tests.tiny import chat, write_rows

STREAMED = ["--set", "data.streaming=true"]


def arguments(model: str, data: Path, run: Path, *more: str, backend: str = "cuda") -> list[str]:
    return [
        *("train", "--model", model, "--data", str(data), "--output", str(run)),
        *("--backend", backend, "--device", "cpu", "--max-steps", "25", "--lr", "1e-3"),
        *("--set", "training_config.save_steps=5", "--set", "training_config.logging_steps=5"),
        *more,
    ]


def lines(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    found = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if key in line]


def test_streamed_runs_of_both_backends_equal_a_run_that_is_not_streamed(
    model: str, data: Path, tmp_path: Path
) -> None:
    losses: dict[str, list[float]] = {}
    hashes = []
    ran = phi3_lora_here(
        *arguments(model, data, tmp_path / "run", "--valid", str(data), "--dry-run")
    )
    assert "40 of 40 different rows are in the training data, too" in ran.stderr
    for name, backend, more in (
        ("whole", "cuda", []),
        ("streamed", "cuda", STREAMED),
        ("mlx", "mlx", STREAMED),
        ("blocks", "cuda", [*STREAMED, "--set", "data.buffer_size=7"]),
        ("blocks on mlx", "mlx", [*STREAMED, "--set", "data.buffer_size=7"]),
    ):
        run = tmp_path / name
        ran = phi3_lora_here(*arguments(model, data, run, *more, "--json", backend=backend))
        assert ran.returncode == 0, ran.stderr
        losses[name] = [line["loss"] for line in lines(run)]
        assert len(losses[name]) == 5
        if more:
            hashes.append([line["plan_hash"] for line in lines(run)])
            assert json.loads(ran.stdout)["plan_hash"] == hashes[-1][-1]
            assert f"plan hash (sha256) | `{hashes[-1][-1]}`" in card(run).lower()
    assert losses["streamed"] == losses["whole"]
    assert losses["mlx"] == pytest.approx(losses["whole"], rel=2e-5)
    assert losses["blocks on mlx"] == pytest.approx(losses["blocks"], rel=2e-5)
    assert losses["blocks"] != losses["whole"]
    assert hashes[0] == hashes[1] and hashes[2] == hashes[3] and hashes[0] != hashes[2]
    assert len({*hashes[0], *hashes[2]}) == 10


def card(run: Path) -> str:
    return (run / "adapter" / "README.md").read_text()


def test_facts_known_before_and_after_the_run_are_reported(
    model: str, data: Path, tmp_path: Path
) -> None:
    valid = write_rows(tmp_path / "valid.jsonl", ROWS[:6])
    options = [*STREAMED, "--set", "data.buffer_size=8", "--valid", str(valid)]
    settings = arguments(model, data, tmp_path / "run", *options)
    plan = json.loads(phi3_lora_here(*settings, "--dry-run", "--json").stdout)
    assert plan["num_documents"] is None and plan["steps_per_epoch"] is None
    assert plan["total_steps"] == 25 and plan["num_eval_documents"] == 6
    assert plan["streamed"]["num_documents"] == plan["streamed"]["buffer_size"] == 8
    shown = phi3_lora_here(*settings, "--dry-run", "--packing", "--max-length", "128").stdout
    (fill,) = [line.split()[1] for line in shown.splitlines() if line.startswith("row_fill")]
    assert 0.7 < float(fill) <= 1
    assert "step_tokens" in shown and "least " in shown
    ran = phi3_lora_here(*settings)
    assert ran.returncode == 0
    name = "training data, of 8 rows read"
    assert f"{name}: 6 of 8 rows are in the validation data, too" in ran.stderr
    assert "data: streamed, 8 rows at a time; the first give 8 documents, " in ran.stderr
    assert "plan: 25 steps of 4 documents on any number of ranks, hash " in ran.stderr
    tokens = plan["step_tokens"]
    assert (
        f"steps: of {tokens['least']} to {tokens['most']} tokens, {tokens['mean']} on average; "
        in (ran.stderr)
    )
    assert "on average; padding 0.0%" in ran.stderr
    # An epoch of 10 steps, evaluated at its end and at the end of the run.
    evaluations = lines(tmp_path / "run", "eval_loss")
    assert [line["step"] for line in evaluations] == [10, 20, 25]
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [0.0, 1.0, 1.0, 2.0, 2.0]
    tokens = sum(line["tokens"] for line in lines(tmp_path / "run"))
    assert f"rows.jsonl`: streamed, {tokens:,} tokens of it" in card(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--set", "training_config.max_steps=-1"], "needs training_config.max_steps"),
        (["--valid-fraction", "0.2"], "name rows to validate on (--valid)"),
        (["--set", "data.buffer_size=0"], "data.buffer_size must be >= 1, got 0"),
    ],
)
def test_settings_that_need_a_pass_first_are_refused(
    model: str, data: Path, tmp_path: Path, options: list[str], phrase: str
) -> None:
    settings = [x for x in arguments(model, data, tmp_path / "run", *STREAMED)]
    if "training_config.max_steps=-1" in options:
        at = settings.index("--max-steps")
        del settings[at : at + 2]
    ran = phi3_lora_here(*settings, *options)
    assert ran.returncode == 2 and phrase in ran.stderr
    assert not (tmp_path / "run").exists()


def test_a_buffer_without_streaming_is_reported_as_without_effect(
    model: str, data: Path, tmp_path: Path
) -> None:
    options = ["--set", "data.buffer_size=8", "--dry-run"]
    ran = phi3_lora_here(*arguments(model, data, tmp_path / "run", *options))
    assert ran.returncode == 0
    assert "data.buffer_size has no effect without data.streaming" in ran.stderr


def test_resuming_needs_the_same_rows(model: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*STREAMED, "--set", "data.buffer_size=8"]
    assert phi3_lora_here(*arguments(model, data, run, *options)).returncode == 0
    whole = [line["plan_hash"] for line in lines(run)]
    for name in ("step-000025", "adapter"):
        path = run / "checkpoints" / name if name.startswith("step") else run / name
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    write_rows(data, [*ROWS[:38], chat("another", "row"), ROWS[39]])
    ran = phi3_lora_here("train", "--resume", "--output", str(run))
    # Step 20 ends a pass, so the next step begins with unchanged rows.
    assert ran.returncode == 0
    assert [line["plan_hash"] for line in lines(run)] == whole
    write_rows(data, [chat("another", "row"), *ROWS[1:]])
    ran = phi3_lora_here("train", "--resume", "--output", str(run))
    assert ran.returncode == 2 and "data: the rows (or the tokenizer) are not those" in ran.stderr
    ran = phi3_lora_here(
        *("train", "--resume", "--output", str(run), "--set", "data.buffer_size=9")
    )
    assert ran.returncode == 2 and "data.buffer_size: the run has 8, now 9" in ran.stderr


def test_a_bad_row_stops_the_run_where_it_is_read_or_is_left_out(
    model: str, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "bad.jsonl", [*ROWS[:30], {"prompt": "?"}, *ROWS[30:]])
    options = [*STREAMED, "--set", "data.buffer_size=8"]
    ran = phi3_lora_here(*arguments(model, data, tmp_path / "run", *options))
    assert ran.returncode == 2
    assert "1 bad row(s) among rows 25 to 32 of" in ran.stderr and f"{data}:31: " in ran.stderr
    assert "last good checkpoint: " in ran.stderr and "step-000005" in ran.stderr
    # With corrected rows, the run continues.
    resumed = phi3_lora_here(
        "train", "--resume", "--output", str(tmp_path / "run"), "--on-bad-row", "skip"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "training data, of 41 rows read: skipped 1 bad row(s):" in resumed.stderr
    other = phi3_lora_here(
        *arguments(model, data, tmp_path / "other", *options, "--on-bad-row", "skip")
    )
    assert other.returncode == 0
    first, second = ([line["loss"] for line in lines(tmp_path / name)] for name in ("run", "other"))
    assert first == second
