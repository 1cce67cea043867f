"""Ways to run the program: in a fresh process, in a process that is forked warm, or in this one."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import group

PROGRAM = [sys.executable, "-m", "phi3_lora_cli"]
_WARM = multiprocessing.get_context("forkserver")
# The server imports the frameworks once and computes nothing, so that each child starts as a fresh
# process does, but without seconds of imports. PyTorch comes first: after MLX's BLAS its own sums
# differ in the last bits from those of a fresh process.
_WARM.set_forkserver_preload(["phi3_lora_cuda", "phi3_lora_mlx", "tests.e2e.program"])


def phi3_lora(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a fresh process."""
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, check=False, **options
    )


def start_warm(*arguments: str, output: Path | str = os.devnull) -> BaseProcess:
    """Start a command in a process of its own that has the frameworks imported.

    Args:
        arguments: of the command.
        output: a file for both stdout and stderr.
    """
    process = _WARM.Process(target=_run, args=(arguments, str(output), str(output)))
    process.start()
    return process


def phi3_lora_warm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a process of its own that has the frameworks imported."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _WARM.Process(target=_run, args=(arguments, str(out), str(err)))
        process.start()
        process.join()
        return subprocess.CompletedProcess(
            arguments, process.exitcode, out.read_text(), err.read_text()
        )


def phi3_lora_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, where the frameworks are imported already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_reporting_faults(group, list(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def train_arguments(inputs: tuple[str, str], run: Path, backend: str) -> list[str]:
    """Sixty steps with a checkpoint every five."""
    model, data = inputs
    return [
        *("train", "--model", model, "--data", data, "--output", str(run)),
        *("--backend", backend, "--device", "cpu", "--max-steps", "60", "--lr", "1e-3"),
        *("--set", "training_config.save_steps=5", "--set", "training_config.logging_steps=3"),
    ]


def _run(arguments: tuple[str, ...], out: str, err: str) -> None:
    """Be the command, in a process that multiprocessing forked."""
    sys.stdout = open(out, "a", buffering=1)  # noqa: SIM115 - open as long as the process is
    sys.stderr = sys.stdout if err == out else open(err, "a", buffering=1)  # noqa: SIM115
    code = run_reporting_faults(group, list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
