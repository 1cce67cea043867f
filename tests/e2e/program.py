"""Functions that run the program in another process or in this one."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import group

PROGRAM = [sys.executable, "-m", "phi3_lora_cli"]


def phi3_lora(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command in another process."""
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, check=False, **options
    )


def phi3_lora_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported the frameworks."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_reporting_faults(group, list(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def train_arguments(inputs: tuple[str, str], run: Path, backend: str) -> list[str]:
    """Return arguments for sixty steps with a checkpoint every five steps."""
    model, data = inputs
    return [
        *("train", "--model", model, "--data", data, "--output", str(run)),
        *("--backend", backend, "--device", "cpu", "--max-steps", "60", "--lr", "1e-3"),
        *("--set", "training_config.save_steps=5", "--set", "training_config.logging_steps=3"),
    ]
