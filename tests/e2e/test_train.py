"""Whole runs: train, kill, resume, score on the other backend, and wrong input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from phi3_lora.errors import AdapterError
from phi3_lora.storage.safetensors import read_all_float32
from tests.e2e.program import (
    PROGRAM,
    phi3_lora_here,
    phi3_lora_warm,
    start_warm,
    stop_after,
    train_arguments,
)
from tests.tiny import chat, write_model, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [chat(f"question {i}", f"answer {i * 7 % 11}") for i in range(40)]
    data = write_rows(folder / "rows.jsonl", rows)
    return str(write_model(folder / "model")), str(data)


def same_tensors(first: Path, second: Path) -> bool:
    a, b = (read_all_float32(p, AdapterError) for p in (first, second))
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


PARTS_AND_WHOLE = [
    *("--targets", "q_proj,v_proj,lm_head", "--dropout", "0.1", "--rank", "4"),
    *("--set", "peft_config.init_lora_weights=pissa"),
    *("--set", "peft_config.use_dora=true", "--set", "peft_config.modules_to_save=[norm]"),
    *("--set", "training_config.loraplus_lr_ratio=4", "--set", "training_config.weight_decay=0.1"),
]

STREAMED = ["--set", "data.streaming=true", "--set", "data.buffer_size=7"]


@pytest.mark.parametrize("backend", ["mlx", "cuda"])
def test_a_fresh_process_that_is_killed_is_resumed_bit_equal_to_uninterrupted(
    inputs: tuple[str, str], tmp_path: Path, backend: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = phi3_lora_warm(*train_arguments(inputs, whole, backend))
    assert done.returncode == 0, done.stderr
    broken, code = stop_after(
        lambda run: subprocess.Popen(
            [*PROGRAM, *train_arguments(inputs, run, backend)], stderr=subprocess.DEVNULL
        ),
        broken,
        step=10,
        number=signal.SIGKILL,
    )
    assert code == -signal.SIGKILL
    resumed = phi3_lora_warm("train", "--resume", "--output", str(broken), "--json")
    assert_resumed_to_the_same_end(resumed, whole, broken)


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("mlx", PARTS_AND_WHOLE),
        ("cuda", PARTS_AND_WHOLE),
        # test_streaming.py stops and resumes streams on PyTorch, in one process.
        ("mlx", STREAMED),
    ],
)
def test_killed_and_resumed_is_bit_equal_to_uninterrupted(
    inputs: tuple[str, str], tmp_path: Path, backend: str, settings: list[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = phi3_lora_warm(*train_arguments(inputs, whole, backend), *settings)
    assert done.returncode == 0, done.stderr
    broken, code = stop_after(
        lambda run: start_warm(*train_arguments(inputs, run, backend), *settings),
        broken,
        step=10,
        number=signal.SIGKILL,
    )
    assert code == -signal.SIGKILL
    resumed = phi3_lora_warm("train", "--resume", "--output", str(broken), "--json")
    assert_resumed_to_the_same_end(resumed, whole, broken)


def assert_resumed_to_the_same_end(
    resumed: subprocess.CompletedProcess[str], whole: Path, broken: Path
) -> None:
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == 60
    for name in (
        "adapter/adapter_model.safetensors",
        "checkpoints/step-000060/optimizer.safetensors",
    ):
        assert same_tensors(whole / name, broken / name), name
    losses = [
        [json.loads(x).get("loss") for x in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, broken)
    ]
    assert [x for x in losses[0] if x] == [x for x in losses[1] if x]


def test_a_run_can_be_resumed_on_the_other_backend(inputs: tuple[str, str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    moved = tmp_path / "moved"
    assert phi3_lora_here(*train_arguments(inputs, whole, "cuda")).returncode == 0
    moved, code = stop_after(
        lambda run: start_warm(*train_arguments(inputs, run, "mlx")),
        moved,
        step=5,
        number=signal.SIGTERM,
    )
    assert code == 143
    resumed = phi3_lora_here(
        *("train", "--resume", "--output", str(moved), "--backend", "cuda", "--device", "cpu"),
        "--json",
    )
    assert resumed.returncode == 0, resumed.stderr
    expected = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert json.loads(resumed.stdout)["final_loss"] == pytest.approx(expected, rel=2e-5)


def test_wrong_input_exits_2_with_a_message_and_writes_nothing(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    model, data = inputs
    run = tmp_path / "run"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\nnot json\n')
    base = ["train", "--output", str(run), "--backend", "cuda", "--device", "cpu"]
    cases = {
        "no such model folder": ["--model", "/nowhere", "--data", data],
        "no such data file": ["--model", model, "--data", "/nowhere.jsonl"],
        "bad.jsonl:2: not JSON": ["--model", model, "--data", str(bad)],
        "matches no layer": ["--model", model, "--data", data, "--targets", "w_proj"],
        "did you mean learning_rate": [
            *("--model", model, "--data", data, "--set", "training_config.learning_rat=1"),
        ],
        "must be >= 1, got 0": ["--model", model, "--data", data, "--rank", "0"],
    }
    for phrase, extra in cases.items():
        found = phi3_lora_here(*base, *extra)
        assert found.returncode == 2, found.stderr
        assert phrase in found.stderr and "Traceback" not in found.stderr
        assert not run.exists()


def test_core_and_command_line_import_no_framework() -> None:
    code = (
        "import sys, phi3_lora.api, phi3_lora.training.run, phi3_lora.adapters.convert, "
        "phi3_lora_cli.main, phi3_lora_cli.train, phi3_lora_cli.evaluate, phi3_lora_cli.doctor; "
        "print([m for m in ('torch', 'mlx', 'transformers', 'peft') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_wheel_holds_four_packages_and_the_demo(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"phi3_lora", "phi3_lora_mlx", "phi3_lora_cuda", "phi3_lora_cli"}
    assert "phi3_lora/demo/model/model.safetensors" in names
    assert wheel.stat().st_size <= 8_000_000
