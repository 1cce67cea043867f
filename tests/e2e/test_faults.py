"""Runs under faults: other inputs on resume, full disks, missing packages, slow BLAS."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from phi3_lora_cli.faults import run_reporting_faults
from tests.e2e.program import PROGRAM, phi3_lora_here, phi3_lora_warm, train_arguments
from tests.tiny import chat, write_model, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [chat(f"question {i}", f"answer {i * 7 % 11}") for i in range(8)]
    return str(write_model(folder / "model")), str(write_rows(folder / "rows.jsonl", rows))


@pytest.fixture
def finished(inputs: tuple[str, str], tmp_path: Path) -> Path:
    run = tmp_path / "run"
    done = phi3_lora_here(*train_arguments(inputs, run, "cuda"), "--max-steps", "6")
    assert done.returncode == 0, done.stderr
    return run


def resume(run: Path, *more: str):
    return phi3_lora_here("train", "--resume", "--output", str(run), "--device", "cpu", *more)


def test_resume_names_the_setting_that_differs(finished: Path) -> None:
    found = resume(finished, "--rank", "3")
    assert found.returncode == 2 and "peft_config.r" in found.stderr, found.stderr


def test_resume_with_other_rows_under_the_same_name_is_refused(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [chat("a", "b")] * 8)
    run = tmp_path / "run"
    assert phi3_lora_here(*train_arguments((inputs[0], str(data)), run, "cuda")).returncode == 0
    write_rows(data, [chat("a", "c")] * 8)
    found = resume(run)
    assert found.returncode == 2 and "data: the rows" in found.stderr, found.stderr


def test_resume_with_other_weights_under_the_same_name_is_refused(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    model, run = write_model(tmp_path / "model"), tmp_path / "run"
    assert phi3_lora_here(*train_arguments((str(model), inputs[1]), run, "cuda")).returncode == 0
    write_model(model, seed=1)
    found = resume(run)
    assert found.returncode == 2 and "model: its config or weights" in found.stderr, found.stderr


def test_resume_keeps_the_start_adapters_shape_and_refuses_another(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    valid = write_rows(tmp_path / "valid.jsonl", [chat("a", "b")] * 3)
    first, run = tmp_path / "first", tmp_path / "run"
    words = [*train_arguments(inputs, first, "cuda"), "--max-steps", "2"]
    assert phi3_lora_here(*words, "--rank", "3", "--alpha", "12").returncode == 0
    words = [*train_arguments(inputs, run, "cuda"), "--adapter", str(first / "adapter")]
    started = phi3_lora_here(*words, "--valid", str(valid), "--max-steps", "2")
    assert started.returncode == 0, started.stderr
    shutil.rmtree(first)
    again = resume(run)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 12
    other = resume(run, "--adapter", str(run / "adapter"))
    assert other.returncode == 2 and "adapter: the run has" in other.stderr, other.stderr
    write_rows(valid, [chat("a", "c")] * 3)
    found = resume(run)
    assert found.returncode == 2 and "data.valid" in found.stderr, found.stderr


def test_a_run_that_trains_nothing_says_so(inputs: tuple[str, str], tmp_path: Path) -> None:
    words = train_arguments(inputs, tmp_path / "run", "cuda")
    found = phi3_lora_here(
        *words, "--max-steps", "1", "--set", "training_config.torch_compile=true"
    )
    assert found.returncode == 0 and "the adapter changes nothing" in found.stderr, found.stderr
    assert "torch_compile has no effect" in found.stderr
    again = resume(tmp_path / "run")
    assert again.returncode == 0 and "this run is finished" in again.stderr


def test_a_damaged_checkpoint_is_passed_over_and_named(finished: Path) -> None:
    newest = sorted((finished / "checkpoints").iterdir())[-1]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    found = resume(finished, "--json")
    assert found.returncode == 0, found.stderr
    assert newest.name in found.stderr and json.loads(found.stdout)["steps"] == 6


def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_disk_that_fills_up_leaves_what_was_saved(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    """A limit on the size of a file stands for the disk: the checkpoint's first file is over it."""
    run = tmp_path / "run"

    arguments = [*train_arguments(inputs, run, "cuda"), "--max-steps", "6"]
    failed = phi3_lora_warm(*arguments, before=no_large_files)
    assert failed.returncode == 2, failed.stderr
    assert "no space left while writing" in failed.stderr and "Traceback" not in failed.stderr
    assert not list((run / "checkpoints").glob("*"))
    found = resume(run, "--json")
    assert found.returncode == 0 and json.loads(found.stdout)["steps"] == 6, found.stderr


@pytest.mark.parametrize(
    ("backend", "package", "line"),
    [("cuda", "peft", "phi3-lora[cuda]"), ("mlx", "mlx_lm", "phi3-lora[mlx]")],
)
def test_a_missing_package_is_named_with_the_pip_line(
    inputs: tuple[str, str], tmp_path: Path, backend: str, package: str, line: str
) -> None:
    words = [*train_arguments(inputs, tmp_path / "run", backend), "--max-steps", "1"]
    code = (
        f"import sys; sys.modules[{package!r}] = None; from phi3_lora_cli.main import main; main()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2, found.stderr
    assert package in found.stderr and f"pip install '{line}'" in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS brings its own BLAS")
def test_doctor_notices_reference_blas_under_mlx() -> None:
    # MLX before its backend, as in a program of a user's own. The other backend takes seconds.
    code = (
        "import mlx.core; from phi3_lora.report import doctor; "
        "doctor.backend_names = lambda: ['mlx']; print(doctor.examine().problems)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    pinned = next(line for line in pyproject.splitlines() if '"cmeel-openblas==' in line)
    assert f"pip install {pinned.split(';')[0].strip()[1:]}" in found.stdout


@pytest.mark.parametrize("words", [["data", "preview", "demo", "--model", "demo"], ["--version"]])
def test_a_closed_pipe_is_not_an_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_full_memory_is_reported_with_advice_for_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = click.Group()

    @group.command()
    def data() -> None:
        raise MemoryError

    group.add_command(data, "train")
    for name, advice in (("data", "--no-near-duplicates"), ("train", "--batch-size")):
        assert run_reporting_faults(group, [name]) == 2
        assert advice in capsys.readouterr().err
