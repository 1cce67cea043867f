"""Runs on streamed data that are stopped, finished and resumed in unusual ways."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from phi3_lora.data.rows.conversation import RawRow
from phi3_lora.data.sources import source as sources_module
from phi3_lora.errors import DataError
from tests.e2e.program import phi3_lora_here, phi3_lora_warm, start_warm
from tests.e2e.streams import ROWS
from tests.tiny import chat, write_rows

STREAMED = ["--set", "data.streaming=true", "--set", "data.buffer_size=8"]


def arguments(model: str, data: Path | str, run: Path, *more: str) -> list[str]:
    return [
        *("train", "--model", model, "--data", str(data), "--output", str(run)),
        *("--backend", "cuda", "--device", "cpu", "--max-steps", "12", "--lr", "1e-3"),
        *("--set", "training_config.save_steps=5", "--set", "training_config.logging_steps=1"),
        *more,
    ]


def resumed(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return phi3_lora_here("train", "--resume", "--output", str(run), *more)


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


def test_a_finished_run_is_not_trained_further(model: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert phi3_lora_here(*arguments(model, data, run, *STREAMED)).returncode == 0
    before = lines(run)
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    ran = resumed(run)
    assert ran.returncode == 0, ran.stderr
    assert "this run is finished: all 12 steps are done" in ran.stderr
    assert lines(run) == before
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_cannot_be_resumed_with_streaming_switched(
    model: str, data: Path, tmp_path: Path
) -> None:
    for name, options, other in (
        ("whole", [], STREAMED),
        ("streamed", STREAMED, ["--set", "data.streaming=false"]),
    ):
        assert phi3_lora_here(*arguments(model, data, tmp_path / name, *options)).returncode == 0
        ran = resumed(tmp_path / name, *other)
        assert ran.returncode == 2 and "data.streaming: the run has" in ran.stderr
        assert "Traceback" not in ran.stderr


def test_a_damaged_position_is_reported(model: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert phi3_lora_here(*arguments(model, data, run, *STREAMED)).returncode == 0
    folder = run / "checkpoints" / "step-000012"
    state = json.loads((folder / "state.json").read_text())
    state["step"] = 11
    state["position"]["block"] = "two"
    content = json.dumps(state).encode()
    (folder / "state.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ran = resumed(run)
    assert ran.returncode == 2 and "position in the data is damaged" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_plan_is_one_json_object_where_the_first_rows_give_no_document(
    model: str, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "gap.jsonl", [*[chat("q", "a" * 300)] * 8, *ROWS])
    options = [*STREAMED, "--packing", "--max-length", "128"]
    ran = phi3_lora_here(*arguments(model, data, tmp_path / "run", *options, "--dry-run", "--json"))
    assert ran.returncode == 0, ran.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    plan = json.loads(ran.stdout, parse_constant=refuse)
    assert plan["row_fill"] is None and plan["streamed"]["num_documents"] == 0
    ran = phi3_lora_here(*arguments(model, data, tmp_path / "run", *options))
    assert ran.returncode == 0, ran.stderr
    assert len(lines(tmp_path / "run")) == 12


def test_events_at_the_end_of_an_epoch_come_at_the_end_of_each_pass(
    model: str, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [*STREAMED, "--valid", str(data), "--set", "training_config.save_strategy=epoch"]
    options += ["--set", "training_config.eval_strategy=epoch", "--set", "data.buffer_size=9"]
    assert phi3_lora_here(*arguments(model, data, run, *options)).returncode == 0
    found = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found if "eval_loss" in line] == [10, 12]
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["step-000010", "step-000012"]


def test_a_hub_data_set_that_fails_on_the_way_leaves_its_checkpoint(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_broken = True

    def hub_rows(*named: Any, streaming: bool) -> Iterator[RawRow]:
        for number, row in enumerate(ROWS, start=1):
            if is_broken and number == 30:
                raise DataError("the data set owner/name cannot be read: ConnectionError: gone")
            yield RawRow(number, row)

    monkeypatch.setattr(sources_module, "hub_rows", hub_rows)
    monkeypatch.setattr(sources_module, "hub_splits", lambda *named: ["train"])
    run = tmp_path / "run"
    ran = phi3_lora_here(*arguments(model, "owner/name", run, *STREAMED))
    assert ran.returncode == 2
    assert "ConnectionError: gone" in ran.stderr and "Traceback" not in ran.stderr
    assert "last good checkpoint: " in ran.stderr and "step-000005" in ran.stderr
    # The steps whose rows had come were taken.
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    is_broken = False
    assert resumed(run).returncode == 0
    whole = tmp_path / "whole"
    assert phi3_lora_here(*arguments(model, "owner/name", whole, *STREAMED)).returncode == 0
    for key in ("loss", "grad_norm", "plan_hash", "epoch"):
        assert [x[key] for x in lines(run)] == [x[key] for x in lines(whole)]


def open_for_writing(pipe: Path, reader: BaseProcess) -> io.FileIO:
    """Open a pipe once its reader has; a reader that ends before that fails the test."""
    while True:
        assert reader.is_alive(), "the reader ended"
        with contextlib.suppress(OSError):
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            return io.FileIO(descriptor, "w")
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_slow_read_saves_the_steps_taken(
    model: str, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run, pipe = tmp_path / "run", tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    texts = data.read_text().splitlines(keepends=True)
    output = tmp_path / "output"
    process = start_warm(*arguments(model, pipe, run, *STREAMED), output=output)
    with open_for_writing(pipe, process) as file:
        # One row of the third block, then a row now and then.
        file.write("".join(texts[:17]).encode())
        while not ((run / "metrics.jsonl").exists() and len(lines(run)) == 3):
            assert process.is_alive(), output.read_text()
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, number)
        # It may stop before it waits for a row; else a row wakes it.
        for text in texts[17:24]:
            process.join(timeout=0.2)
            if not process.is_alive():
                break
            with contextlib.suppress(BrokenPipeError):
                file.write(text.encode())
        process.join()
    said = output.read_text()
    assert process.exitcode == 128 + number, said
    assert "stopped at step 3 of 12, saved" in said
    # With equal rows, the run continues from the saved step.
    assert (run / "checkpoints" / "step-000003").is_dir()
    pipe.unlink()
    write_rows(pipe, ROWS)
    # In processes of the same kind, whose libraries are loaded in the same order.
    ran = phi3_lora_warm("train", "--resume", "--output", str(run))
    assert ran.returncode == 0, ran.stderr
    whole = tmp_path / "whole"
    assert phi3_lora_warm(*arguments(model, data, whole, *STREAMED)).returncode == 0
    for key in ("loss", "plan_hash", "epoch"):
        assert [x[key] for x in lines(run)] == [x[key] for x in lines(whole)]


@pytest.mark.parametrize(("at_row", "step"), [(4, 0), (7, 1)])
def test_a_signal_before_the_next_rows_have_come_takes_no_more_steps(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_row: int, step: int
) -> None:
    is_first = True

    def hub_rows(*named: Any, streaming: bool) -> Iterator[RawRow]:
        nonlocal is_first
        for number, row in enumerate(ROWS, start=1):
            yield RawRow(number, row)
            if is_first and number == at_row:
                is_first = False
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sources_module, "hub_rows", hub_rows)
    monkeypatch.setattr(sources_module, "hub_splits", lambda *named: ["train"])
    run = tmp_path / "run"
    # Each read gives three rows, and the first step needs four.
    buffer = ["--set", "data.streaming=true", "--set", f"data.buffer_size={3 + 2 * step}"]
    ran = phi3_lora_here(*arguments(model, "owner/name", run, *buffer))
    assert ran.returncode == 128 + signal.SIGTERM
    saved = ", saved" if step else ""
    assert f"stopped at step {step} of 12{saved}; resume with: phi3-lora train" in ran.stderr
    assert (run / "checkpoints").exists() == bool(step)
    assert resumed(run).returncode == 0
    whole = tmp_path / "whole"
    assert phi3_lora_here(*arguments(model, "owner/name", whole, *buffer)).returncode == 0
    assert [x["loss"] for x in lines(run)] == [x["loss"] for x in lines(whole)]
